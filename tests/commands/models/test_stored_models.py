"""Commands ``k2 models list``, ``show``, ``remove`` and ``prune``, with the real Hub client."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest

from k2cli.agent.locks import Claim, lock_path, take
from k2cli.errors import K2Error
from k2cli.models.inventory.readers import not_read, reading
from k2cli.models.part import write_part_list
from k2cli.runs.record import RankRecord, RunRecord, RunState, read_record, save_record
from tests.models.mock_hub import COMMIT, MockHub, served_hub
from tests.support.commands import k2
from tests.support.hub_cache import NEW, put_revision, small_model
from tests.support.ssh_server import Server

LIBRARY = """
import huggingface_hub as h
print(h.snapshot_download("mock/model", local_files_only=True))
assert not h.scan_cache_dir().warnings
"""
WEIGHTS = small_model(1)["model-00001-of-00002.safetensors"]
SHARD = "model-00002-of-00002.safetensors"


def _models(*options: str) -> dict[str, list[dict[str, Any]]]:
    done = k2("models", "list", "--json", *options)
    document = json.loads(done.stdout)
    assert (done.returncode, document["schema_version"]) == (0, 1), done.stderr
    return {node["node"]: node["models"] for node in document["nodes"]}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[MockHub]:
    """A Hub with a model, and an empty cache."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    files: dict[str, Any] = {**small_model(1), "tokenizer.json": b"{}"}
    with served_hub(MockHub(files)) as served:
        monkeypatch.setenv("HF_ENDPOINT", served.address)
        yield served


@pytest.fixture
def two_revisions(hub: MockHub) -> str:
    """Download a model twice, of which the Hub moves meanwhile; return the new commit."""
    assert k2("download", "mock/model").returncode == 0
    hub.moved({**small_model(2), "tokenizer.json": b"{}"})
    assert k2("download", "mock/model").returncode == 0
    return hub.commit


def test_an_old_revision_is_removed_and_the_new_one_still_loads(two_revisions: str) -> None:
    (models,) = _models().values()
    assert [model["commit"] for model in models] == [two_revisions, COMMIT]
    assert {model["state"] for model in models} == {"complete"}
    assert models[0]["verified"]["by"] == "download"
    text = k2("models", "list")
    assert text.returncode == 0
    assert all(len(line) <= 80 for line in text.stdout.splitlines())
    assert "\x1b" not in text.stdout + text.stderr

    unasked = k2("models", "remove", "mock/model", "--revision", COMMIT[:7])
    assert unasked.returncode == 2
    assert f"k2 models remove mock/model --revision {COMMIT[:7]} --yes" in unasked.stderr
    assert k2("models", "prune", "--dry-run").stdout.count("no branch or tag points to it") == 1
    done = k2("models", "remove", "mock/model", "--revision", COMMIT[:7], "--yes", "--json")
    assert done.returncode == 0, done.stderr
    freed = json.loads(done.stdout)["nodes"][0]["freed_bytes"]
    assert freed == models[1]["own_bytes"] == sum(map(len, _changed().values()))
    library = subprocess.run([sys.executable, "-c", LIBRARY], capture_output=True, text=True)
    assert library.returncode == 0, library.stderr
    loaded = Path(library.stdout.strip())
    assert (loaded / SHARD).read_bytes() == small_model(2)[SHARD]
    shown = k2("models", "show", "mock/model")
    assert two_revisions in shown.stdout
    assert COMMIT not in shown.stdout
    assert k2("models", "verify", "mock/model").returncode == 0

    assert k2("models", "remove", "mock/model", "--yes").returncode == 0
    empty = k2("models", "list")
    assert (empty.returncode, empty.stdout) == (0, "")
    assert "k2 download demo" in empty.stderr
    assert not [*Path(os.environ["HF_HOME"]).rglob("models--*/*")]


def _changed() -> dict[str, bytes]:
    other = small_model(2)
    return {name: data for name, data in small_model(1).items() if other[name] != data}


def test_prune_frees_what_nothing_needs_and_says_how_much(two_revisions: str) -> None:
    done = k2("models", "prune", "--yes", "--json")
    assert done.returncode == 0, done.stderr
    (node,) = json.loads(done.stdout)["nodes"]
    assert [item["what"] for item in node["items"]] == ["revision"]
    assert node["items"][0]["bytes"] == sum(map(len, _changed().values()))
    (models,) = _models().values()
    assert [model["commit"] for model in models] == [two_revisions]
    assert k2("models", "prune").returncode == 0  # nothing to ask about
    assert k2("models", "prune", "--older-than", "nan").returncode == 2


def _run(
    state: RunState, model: str, folders: dict[str, str], node: str = "localhost"
) -> RunRecord:
    """Record a run whose supervisor is this process, or has ended."""
    own = psutil.Process()
    record = RunRecord(
        run_id=f"model-{len(folders)}a1b",
        model=model,
        model_name=model,
        state=state,
        backend="local",
        strategy="single",
        context_length=128,
        ranks=(RankRecord(0, node),),
        created=time.time(),
        pid=own.pid,
        pid_create_time=own.create_time(),
        model_folders=folders,
    )
    record.folder.mkdir(parents=True)
    save_record(record)
    return record


@pytest.mark.usefixtures("hub")
def test_what_a_run_uses_is_not_removed(two_revisions: str) -> None:
    (models,) = _models().values()
    record = _run("ready", "mock/model", {"localhost": models[0]["folder"]})
    (models,) = _models().values()
    assert [model["used_by"] for model in models] == [[record.run_id], []]
    refused = k2("models", "remove", "mock/model", "--yes")
    assert refused.returncode == 1
    assert f"is used by the run {record.run_id}" in refused.stderr
    assert f"hint: k2 stop {record.run_id}\n" in refused.stderr
    old = k2("models", "remove", "mock/model", "--revision", COMMIT, "--yes")
    assert old.returncode == 0, old.stderr

    # A record of an earlier version does not say which folder the run has.
    path = record.folder / "run.json"
    fields = json.loads(path.read_bytes())
    del fields["model_folders"]
    path.write_text(json.dumps(fields))
    assert read_record(record.folder) == replace(record, model_folders={})
    assert k2("models", "remove", "mock/model", "--yes").returncode == 1
    save_record(replace(record, state="stopped", ended=time.time()))
    assert k2("models", "remove", "mock/model", "--yes").returncode == 0


@pytest.mark.usefixtures("two_revisions")
@pytest.mark.parametrize("known", ["folder", "model", "id"])
def test_a_run_that_another_machine_launched_is_respected(known: str) -> None:
    """Its lock on this machine says what it uses; that of an earlier version only its id."""
    (models,) = _models().values()
    claim = Claim("model-7f31", "jane", "laptop", 1, 0.0)
    if known == "folder":
        claim = msgspec.structs.replace(claim, folder=models[0]["folder"], model="mock/model")
    elif known == "model":
        claim = msgspec.structs.replace(claim, model="mock/model")
    assert take(claim, lambda run: 0, share=False).taken
    refused = k2("models", "remove", "mock/model", "--yes")
    assert refused.returncode == 1
    assert "hint: k2 stop model-7f31, on laptop" in refused.stderr
    (models,) = _models().values()
    expected = [["model-7f31"], [] if known == "folder" else ["model-7f31"]]
    assert [model["used_by"] for model in models] == expected
    lock_path("model-7f31").unlink()
    assert k2("models", "remove", "mock/model", "--yes").returncode == 0


@pytest.mark.usefixtures("two_revisions")
def test_a_running_push_is_respected(tmp_path: Path) -> None:
    lock = tmp_path / "hf" / "hub" / "models--mock--model" / ".k2-incoming.lock"
    with lock.open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        refused = k2("models", "remove", "mock/model", "--yes")
        assert refused.returncode == 1
        assert "being written by a running push" in refused.stderr
        assert "a push is running" in k2("models", "prune", "--yes").stderr
    assert len(_models()["localhost"]) == 2


def test_what_a_push_reads_stays(two_revisions: str, tmp_path: Path) -> None:
    snapshots = tmp_path / "hf" / "hub" / "models--mock--model" / "snapshots"
    (old,) = (path for path in snapshots.iterdir() if path.name != two_revisions)
    with reading(old), reading(old):
        refused = k2("models", "remove", "mock/model", "--yes")
        assert refused.returncode == 1
        assert "is being sent by a running push" in refused.stderr
        assert k2("models", "prune", "--yes").returncode == 0
        assert len(_models()["localhost"]) == 2
    with not_read(old, "x"), pytest.raises(K2Error, match="is being removed"), reading(old):
        pass
    assert k2("models", "prune", "--yes").returncode == 0
    assert [model["commit"] for model in _models()["localhost"]] == [two_revisions]


def test_an_interrupted_download_of_the_library_is_listed(hub: MockHub, tmp_path: Path) -> None:
    hub.files |= small_model(1, 30_000_000)
    hub.faults = {SHARD: "sticks"}
    code = "import huggingface_hub as h; h.snapshot_download('mock/model')"
    library = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
    try:
        blobs = tmp_path / "hf" / "hub" / "models--mock--model" / "blobs"
        until = time.monotonic() + 60
        while not any(path.stat().st_size for path in blobs.glob("*.incomplete")):
            assert time.monotonic() < until
            time.sleep(0.05)
        (model,) = _models()["localhost"]
        assert (model["state"], model["writer"]) == ("incomplete", "download")
        assert k2("models", "remove", "mock/model", "--yes").returncode == 1
    finally:
        library.kill()
        library.wait(10)
    (model,) = _models()["localhost"]
    assert (model["state"], model["writer"]) == ("incomplete", "")
    assert 0 < model["missing_bytes"] < len(hub.files[SHARD])
    assert k2("models", "prune", "--yes").returncode == 0
    assert len(_models()["localhost"]) == 1  # a branch points to it, and it is not old
    hub.faults = {}
    assert k2("download", "mock/model").returncode == 0
    (model,) = _models()["localhost"]
    assert model["state"] == "complete"
    assert k2("models", "remove", "mock/model", "--yes").returncode == 0
    assert not [*blobs.parent.parent.rglob("models--*")]


@pytest.mark.soak
def test_another_machine_lists_and_removes_its_own_models(
    ssh_server: Server, two_revisions: str
) -> None:
    """Node b has a home of its own, with one whole model and a part of another."""
    there = ssh_server.folder / "home" / ".cache" / "huggingface" / "hub"
    shutil.rmtree(there, ignore_errors=True)
    whole = put_revision(there, NEW, small_model(1), "main")
    part = put_revision(there, NEW, {"config.json": b"{}", "model.safetensors": WEIGHTS}, "main",
                        repo="mock/part")  # fmt: skip
    (part / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"t": "model.safetensors", "u": "more.safetensors"}})
    )
    write_part_list(part, {"more.safetensors": 5000})
    assert [model["commit"] for model in _models()["localhost"]] == [two_revisions, COMMIT]
    (models,) = _models("--nodes", "b").values()
    assert [(model["repo"], model["state"]) for model in models] == [
        ("mock/model", "complete"),
        ("mock/part", "part"),
    ]
    table = k2("models", "list", "--nodes", "localhost,b").stdout
    assert table.splitlines()[0].split()[:3] == ["MODEL", "NODE", "REVISION"]
    assert "5.0 kB of it are on other machines" in table
    shown = k2("models", "show", "mock/part", "--nodes", "localhost,b")
    assert (shown.returncode, str(part) in shown.stdout) == (0, True)

    record = _run("ready", "mock/model", {"localhost": "/absent", "b": str(whole)}, "b")
    refused = k2("models", "remove", "mock/model", "--nodes", "b", "--yes")
    assert refused.returncode == 1
    assert f"node b: 'mock/model' is used by the run {record.run_id}" in refused.stderr
    save_record(replace(record, state="stopped", ended=time.time()))
    assert k2("models", "remove", "mock/absent", "--nodes", "b", "--yes").returncode == 1
    done = k2("models", "remove", "mock/model", "--nodes", "b", "--yes")
    assert done.returncode == 0, done.stderr
    assert "removed mock/model on b" in done.stdout
    assert [path.name for path in there.glob("models--*")] == ["models--mock--part"]
    assert len(_models()["localhost"]) == 2
    absent = k2("models", "list", "--nodes", "b,nowhere", "--json")
    assert absent.returncode == 5
    assert [node["node"] for node in json.loads(absent.stdout)["nodes"]] == ["b", "nowhere"]


def test_odd_names_in_the_cache_are_shown_safely_and_stop_nothing(tmp_path: Path) -> None:
    home, elsewhere = tmp_path / "a home" / "hf", tmp_path / "disk"
    elsewhere.mkdir()
    home.mkdir(parents=True)
    cache = home / "hub"
    cache.symlink_to(elsewhere)
    folder = put_revision(cache, "1" * 40, small_model(1), "main", "a/b\x1b[31m", "pr/1")
    for name in (b"\xff\xfe.safetensors", b"new\nline.json", b"\x1b]0;title\x07.json"):
        Path(os.fsdecode(os.fsencode(folder) + b"/" + name)).write_bytes(b"x")
    os.mkfifo(folder / "pipe.safetensors")
    (folder / "loop.json").symlink_to("loop.json")
    odd = put_revision(cache, "1" * 40, small_model(1), "main", repo="mock/\x1b[2J\nodd")
    Path(os.fsdecode(os.fsencode(cache) + b"/models--\xff--x")).mkdir()
    environment = {"HF_HOME": str(home), "HF_HUB_CACHE": "", "HF_HUB_OFFLINE": "1"}
    del environment["HF_HUB_CACHE"]
    for arguments in (
        ("list",), ("list", "--json"), ("show", "mock/model"), ("show", "mock/model", "--json"),
        ("prune", "--dry-run", "--older-than", "0"), ("verify", "mock/model"),
        ("verify", "mock/model", "--json"),
    ):  # fmt: skip
        done = k2("models", *arguments, **environment)
        assert done.returncode == (1 if arguments[0] == "verify" else 0), (arguments, done.stderr)
        assert not {"\x1b", "\x07", "\ufeff"} & {*done.stdout, *done.stderr}, arguments
        if "--json" in arguments:
            json.loads(done.stdout)
    for name in ("mock/model", "/", "~", ".", str(cache), str(folder.parent.parent)):
        done = k2("models", "remove", name, **environment)  # there is no terminal
        assert done.returncode in (1, 2), done.stderr
    assert (folder / SHARD).exists()
    for name in ("/", "~", ".", str(cache), str(folder.parent), str(folder.parent.parent)):
        done = k2("models", "remove", name, "--yes", **environment)
        assert done.returncode in (1, 2), done.stderr
        assert "rm -r" not in done.stderr
    assert (folder / SHARD).exists()
    assert k2("models", "remove", "mock/model", "--yes", **environment).returncode == 0
    assert not folder.exists()
    assert (odd / SHARD).exists()
