"""``k2 launch``, ``ps``, ``logs`` and ``stop`` from outside, on real ranks of a toy model."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from k2cli.agent import run_processes
from k2cli.agent.activity import is_alive
from tests.support.harness import GONE_SECONDS, wait_until

pytestmark = [pytest.mark.ranks, pytest.mark.slow]
READY_SECONDS = 120


def k2(*arguments: str, timeout: float = READY_SECONDS) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "k2cli", *arguments],
        capture_output=True,
        text=True,
        timeout=timeout,
        stdin=subprocess.DEVNULL,
    )


def runs() -> list[dict[str, Any]]:
    document = json.loads(k2("ps", "--json").stdout)
    assert document["schema_version"] == 1
    found: list[dict[str, Any]] = document["runs"]
    return found


@contextmanager
def foreground(*arguments: str) -> Iterator[tuple[subprocess.Popen[str], list[str]]]:
    """A ``k2 launch`` in a process group of its own, and the lines of its stderr."""
    process = subprocess.Popen(
        [sys.executable, "-m", "k2cli", "launch", *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    lines: list[str] = []
    assert process.stderr is not None
    stderr = process.stderr
    reader = threading.Thread(target=lambda: lines.extend(iter(stderr.readline, "")))
    reader.start()
    try:
        yield process, lines
    finally:
        if process.poll() is None:
            process.terminate()
        process.wait(30)
        reader.join(30)
        stderr.close()


def wait_for_line(process: subprocess.Popen[str], lines: list[str], begin: str) -> None:
    def seen() -> bool:
        assert process.poll() is None, "".join(lines)
        return any(line.startswith(begin) for line in lines)

    wait_until(seen, READY_SECONDS, begin)


@pytest.mark.parametrize(
    ("backend", "parallel", "nodes"),
    [("mpi", "pipeline", 2), ("ring", "tensor", 2), ("auto", "auto", 1)],
)
def test_a_detached_run_from_launch_to_stop(
    backend: str, parallel: str, nodes: int, toy_k2: Path
) -> None:
    names = ",".join(["localhost"] * nodes)
    options = ("--backend", backend, "--parallel", parallel, "--context", "512")
    done = k2("launch", str(toy_k2), "--nodes", names, *options, "--detach", "--json")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert [rank["node"] for rank in document["ranks"]] == ["localhost"] * nodes
    assert all(rank["weights_bytes"] > 0 for rank in document["ranks"])
    assert httpx.get(f"{document['url']}/health").status_code == 200
    (run,) = runs()
    assert (run["run_id"], run["state"], run["url"]) == (
        document["run_id"], "ready", document["url"],
    )  # fmt: skip
    assert f"k2 stop {run['run_id']}" in done.stderr
    assert (Path(document["log"]).parent / "plan.json").is_file()

    stopped = k2("stop", "--json")
    assert stopped.returncode == 0, stopped.stderr
    (report,) = json.loads(stopped.stdout)["stopped"]
    assert (report["state"], report["killed"]) == ("stopped", 0)
    assert run_processes.processes_of_run(run["run_id"]) == []
    assert not is_alive(document["pid"], run["pid_create_time"])
    logs = [json.loads(line) for line in k2("logs", "--json").stdout.splitlines()]
    assert [entry["text"] for entry in logs if "stopped" in entry["text"]] == ["stopped"]
    # What mpirun has to say at an ordered end is no news.
    assert not [entry for entry in logs if entry["rank"] == "mpirun"]
    again = k2("stop", run["run_id"])
    assert again.returncode == 0
    assert "had already ended" in again.stdout


def test_ctrl_c_stops_a_run_in_the_foreground(toy_k2: Path) -> None:
    with foreground(str(toy_k2), "--nodes", "localhost,localhost") as (process, lines):
        wait_for_line(process, lines, "ready: ")
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130
    assert "stopping; Ctrl-C again to force\n" in lines
    assert runs()[0]["state"] == "stopped"
    assert run_processes.processes_of_run(runs()[0]["run_id"]) == []


def test_a_rank_killed_at_work_breaks_off_its_requests_and_ends_the_launch(toy_k2: Path) -> None:
    with foreground(str(toy_k2), "--nodes", "localhost,localhost") as (process, lines):
        wait_for_line(process, lines, "ready: ")
        (run,) = runs()
        body = {"prompt": "Hello", "max_tokens": 20_000, "stream": True}
        received = ""
        with httpx.stream("POST", f"{run['url']}/v1/completions", json=body, timeout=60) as answer:
            assert answer.status_code == 200, answer.read()
            for text in answer.iter_text():
                if not received:
                    os.kill(run["ranks"][1]["rank_pid"], signal.SIGKILL)
                received += text
        assert '"error"' in received
        assert "rank 1 on localhost failed" in received
        assert process.wait(GONE_SECONDS) == 5
    message = "".join(lines)
    assert "error: rank 1 on localhost failed: it was killed by SIGKILL" in message
    assert f"hint: k2 logs {run['run_id']}" in message
    assert run_processes.processes_of_run(run["run_id"]) == []
    assert runs()[0]["failure"]["exit_status"] == -signal.SIGKILL


@pytest.mark.soak  # every day with a follower, in tests/guard/test_faults.py
def test_a_stopped_real_rank_ends_the_run(toy_k2: Path) -> None:
    done = k2("launch", str(toy_k2), "--nodes", "localhost,localhost", "--detach")
    assert done.returncode == 0, done.stderr
    (run,) = runs()
    os.kill(run["ranks"][0]["rank_pid"], signal.SIGSTOP)
    wait_until(lambda: not run_processes.processes_of_run(run["run_id"]), GONE_SECONDS, "the end")
    wait_until(lambda: runs()[0]["state"] == "failed", 10, "the record's end")
    assert runs()[0]["failure"]["rank"] == 0
    listed = k2("ps").stdout
    assert "failed" in listed
    assert "SIGSTOP" in listed


def test_a_launch_that_fails_while_loading_says_why(toy_k2: Path, tmp_path: Path) -> None:
    """A plan whose bytes are not the model's: the rank refuses to serve."""
    plan = tmp_path / "plan.json"
    saved = k2("plan-memory", str(toy_k2), "--hardware", "this", "--save", str(plan))
    assert saved.returncode == 0, saved.stderr
    document = json.loads(plan.read_text())
    document["nodes"][0]["weights_bytes"] += 1
    plan.write_text(json.dumps(document))
    done = k2("launch", str(toy_k2), "--nodes", "localhost", "--plan", str(plan), "--detach")
    assert done.returncode == 5
    assert done.stdout == ""
    assert "error: rank 0 on localhost failed" in done.stderr
    assert "hint: k2 logs" in done.stderr
    assert runs()[0]["state"] == "failed"
    both = k2("launch", str(toy_k2), "--plan", str(plan), "--context", "64")
    assert both.returncode == 2
    assert "--context is decided by the plan" in both.stderr


def test_refusals_before_anything_is_started(toy_k2: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        taken = k2("launch", str(toy_k2), "--port", str(port))
    assert taken.returncode == 1
    assert f"process {os.getpid()}" in taken.stderr
    big = k2("launch", str(toy_k2), "--concurrency", "4096", "--context", "32768")
    assert big.returncode == 3, big.stderr
    assert "--force" in big.stderr
    far = k2("launch", str(toy_k2), "--nodes", "localhost,no-such-host.invalid")
    assert far.returncode == 5
    assert "node no-such-host.invalid cannot be reached" in far.stderr
    odd = k2("launch", str(toy_k2), "--nodes", "localhost,,localhost")
    assert odd.returncode == 2
    parser = k2("launch", str(toy_k2), "--tool-parser", "kimi")
    assert parser.returncode == 2
    assert "--tool-parser 'kimi' is not the name of a parser" in parser.stderr
    assert "hint: leave --tool-parser out" in parser.stderr
    assert runs() == []


def test_another_address_than_loopback_gets_a_key_and_options_reach_the_api(toy_k2: Path) -> None:
    options = ["--alias", "gpt-4o", "--alias", "org/coder", "--tool-parser", "hermes"]
    done = k2("launch", str(toy_k2), "--host", "0.0.0.0", "--context", "256", "--detach", *options)
    assert done.returncode == 0, done.stderr
    (run,) = runs()
    assert run["settings"]["aliases"] == "gpt-4o, org/coder"
    assert run["settings"]["tool parser"] == "hermes"
    assert "reasoning parser" not in run["settings"]
    path = Path(os.environ["K2_STATE_DIR"]) / "runs" / run["run_id"] / "api-key"
    assert str(path) in done.stderr
    assert path.stat().st_mode & 0o777 == 0o600
    models = f"{run['url']}/v1/models"
    assert httpx.get(models).status_code == 401
    key = {"Authorization": f"Bearer {path.read_text()}"}
    listed = httpx.get(models, headers=key).json()["data"]
    assert [model["id"] for model in listed] == [toy_k2.name, "gpt-4o", "org/coder"]
    assert {model["tool_parser"] for model in listed} == {"json_tools"}
    ask = {"model": "gpt-4o", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}
    answer = httpx.post(f"{run['url']}/v1/chat/completions", json=ask, headers=key, timeout=60)
    assert answer.json()["model"] == "gpt-4o"
    assert k2("stop", "--all").returncode == 0
    assert not path.exists()
