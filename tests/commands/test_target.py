"""Test the search of ``k2 chat`` and ``k2 bench`` for the run that they talk to."""

from __future__ import annotations

import functools
import http.server
import json
import os
import threading
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from k2cli.commands import target
from k2cli.runs.record import RankRecord, RunRecord, save_record
from k2cli.server.served_model import ServedModel
from tests.commands.test_bench import CountingEngine
from tests.server.commands import run_k2
from tests.server.scripted import serving


@pytest.fixture
def record() -> RunRecord:
    return live_record()


def live_record() -> RunRecord:
    """A live run: this process is its supervisor."""
    return RunRecord(
        run_id="toy-1a2b",
        model="models/toy",
        model_name="toy",
        state="ready",
        backend="mpi",
        strategy="pipeline",
        context_length=500,
        ranks=(RankRecord(0, "localhost"), RankRecord(1, "localhost")),
        created=time.time(),
        pid=os.getpid(),
        pid_create_time=psutil.Process().create_time(),
    )


def save(record: RunRecord, url: str) -> None:
    record.folder.mkdir(parents=True, exist_ok=True)
    save_record(replace(record, url=url))
    key = record.folder / "api-key"
    key.write_text("s3cret\n")
    key.chmod(0o600)


def test_a_live_run_is_found_with_its_key(record: RunRecord) -> None:
    engine = CountingEngine()
    with serving(engine, ServedModel("toy", context_length=500, api_key="s3cret")) as url:
        save(record, url)
        done = run_k2("chat", "-p", "Where?", "--max-tokens", "5")
        assert done.returncode == 0, done.stderr
        assert done.stdout.endswith("aaa\n")
        for name in ("toy", "models/toy", "toy-1a2b"):
            assert run_k2("chat", name, "-p", "x", "--max-tokens", "1").returncode == 0
        done = run_k2("chat", "demo", "-p", "x")
        assert done.returncode == 1
        assert "no live run serves 'demo'; live runs serve toy" in done.stderr
        assert "hint: k2 launch demo --detach" in done.stderr
        done = run_k2("bench", "nonsense")  # no model that could be launched
        assert "hint: a name of a run, such as toy" in done.stderr
        done = run_k2("chat", "What is a tree?")
        assert done.returncode == 2
        assert "hint: k2 chat -p 'What is a tree?'" in done.stderr
        done = run_k2("bench", "-p", "8", "-n", "0", "-r", "1", "-o", "json")
        assert json.loads(done.stdout)["run"] == {
            "run_id": "toy-1a2b",
            "backend": "mpi",
            "strategy": "pipeline",
            "context_length": 500,
            "ranks": 2,
            "nodes": ["localhost", "localhost"],
        }
        assert "s3cret" not in done.stdout + done.stderr


def test_a_server_of_something_else_is_told_apart() -> None:
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=os.devnull)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        done = run_k2("chat", "--url", url, "-p", "x")
        server.shutdown()
    assert f"error: {url}/v1 is no OpenAI-compatible API: HTTP status 404" in done.stderr
    assert "hint: k2 ps" in done.stderr


def test_a_run_that_is_not_ready(record: RunRecord) -> None:
    save(replace(record, state="loading"), "")
    done = run_k2("chat", "-p", "x")
    assert done.returncode == 5
    assert "run toy-1a2b is loading, not ready" in done.stderr
    assert "hint: k2 ps" in done.stderr


def test_a_run_whose_key_is_removed_as_it_ends_has_none(
    record: RunRecord, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is asked of the run then fails with the reason, that it is over."""
    save(record, "http://127.0.0.1:9")
    read = target.read_regular

    def read_too_late(path: Path, limit: int) -> bytes:
        path.unlink()
        return read(path, limit)

    monkeypatch.setattr(target, "read_regular", read_too_late)
    assert target.key_of(record) is None
