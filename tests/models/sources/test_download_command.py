"""Downloads by the command with the real Hub client: interruptions, refusals, two at once."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import random
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from k2cli.models.sources.expected_files import verify_file
from k2cli.models.sources.snapshot_record import recorded_snapshot
from k2cli.units import format_bytes
from tests.hostile.test_full_disk import fill, mounted
from tests.models.mock_hub import GOOD_TOKEN, MockHub, served_hub
from tests.support import commands

WEIGHTS = "model.safetensors"
K2 = [*commands.K2, "download"]
LIBRARY = """
import sys
from huggingface_hub import snapshot_download
print(snapshot_download("mock/model", local_files_only=sys.argv[1] == "offline"))
"""


@functools.cache
def weights(nbytes: int, seed: int = 1) -> bytes:
    """Make a safetensors file of one tensor of random bytes."""
    header = {"t": {"dtype": "U8", "shape": [nbytes], "data_offsets": [0, nbytes]}}
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + random.Random(seed).randbytes(nbytes)


@pytest.fixture
def hub(toy_k2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[MockHub]:
    files = {path.name: path.read_bytes() for path in sorted(toy_k2.iterdir())}
    files |= {WEIGHTS: weights(40_000_000), "modeling.py": b"raise SystemExit"}
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    with served_hub(MockHub(files)) as served:
        monkeypatch.setenv("HF_ENDPOINT", served.address)
        yield served


def k2(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return commands.k2("download", *arguments, **environment)


def folder_of(done: subprocess.CompletedProcess[str]) -> Path:
    assert done.returncode == 0, done.stderr
    return Path(json.loads(done.stdout)["path"])


def library(mode: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", LIBRARY, mode], capture_output=True, text=True, timeout=100,
        env=dict(os.environ),
    )  # fmt: skip


def is_right(folder: Path, hub: MockHub) -> None:
    record = recorded_snapshot(folder)
    assert record is not None
    assert (record.repo, record.commit, record.whole) == ("mock/model", hub.commit, True)
    assert {file.name for file in record.files} == hub.files.keys() - {"modeling.py"}
    for file in record.files:
        assert verify_file(folder / file.name, file) is None
        assert (folder / file.name).read_bytes() == hub.files[file.name]
    assert not list(folder.parent.parent.glob("blobs/*.*"))


def started(hub: MockHub, least_bytes: int, *arguments: str) -> subprocess.Popen[str]:
    """Start a download, and return when the Hub has sent so many bytes."""
    hub.sent.clear()
    process = subprocess.Popen(
        [*K2, "mock/model", "--limit-rate", "20M", *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=dict(os.environ),
    )  # fmt: skip
    deadline = time.monotonic() + 100
    while sum(hub.sent) < least_bytes and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    return process


def test_kills_lose_little(hub: MockHub) -> None:
    sent = 0
    for _ in range(2):
        process = started(hub, 10_000_000)
        process.kill()
        process.communicate(timeout=20)
        time.sleep(0.2)
        sent += sum(hub.sent)
    hub.sent.clear()
    is_right(folder_of(k2("mock/model", "--json")), hub)
    sent += sum(hub.sent)
    size = sum(len(data) for data in hub.files.values())
    assert sent <= size + 2 * 6_000_000  # what k2 and the system had taken, of eight streams


def test_an_interrupt_names_the_command_that_continues(hub: MockHub) -> None:
    process = started(hub, 5_000_000)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert "to continue: k2 download mock/model --limit-rate 20M" in said
    dry = json.loads(k2("mock/model", "--dry-run", "--json").stdout)
    assert 0 < dry["missing_bytes"] < 39_500_000  # the rest was on its way
    hub.sent.clear()
    is_right(folder_of(k2("mock/model", "--json")), hub)
    assert dry["missing_bytes"] <= sum(hub.sent) < dry["missing_bytes"] + 5000  # and the list


def test_two_downloads_at_once_share_the_work(hub: MockHub) -> None:
    first, second = started(hub, 1), started(hub, 0)
    assert first.wait(timeout=100) == second.wait(timeout=100) == 0
    for process in (first, second):
        process.communicate(timeout=10)
    size = sum(len(data) for data in hub.files.values())
    assert sum(hub.sent) < 1.1 * size
    is_right(folder_of(k2("mock/model", "--json")), hub)


def test_each_tool_takes_what_the_other_fetched(hub: MockHub, tmp_path: Path) -> None:
    folder = folder_of(k2("mock/model", "--json"))
    assert library("offline").stdout.strip() == str(folder)
    hub.requested.clear()
    assert library("online").stdout.strip() == str(folder)
    fetched = {line.rpartition("/")[2] for line in hub.requested if line.startswith("GET /mock")}
    assert fetched == {"modeling.py"}  # what k2 does not take
    # The other way round.
    os.environ["HF_HOME"] = str(tmp_path / "other")
    folder = Path(library("online").stdout.strip())
    hub.requested.clear()
    done = json.loads(k2("mock/model", "--json").stdout)
    assert (done["was_there"], done["path"]) == (True, str(folder))
    assert not any(line.startswith("GET /mock") for line in hub.requested)
    # A folder takes the content of the cache, and a partial file of neither is left.
    hub.requested.clear()
    is_right(folder_of(k2("mock/model", "--json", "--to", str(tmp_path / "here"))), hub)
    assert not any(line.startswith("GET /mock") for line in hub.requested)


def test_a_dry_run_writes_nothing(hub: MockHub, tmp_path: Path) -> None:
    done = json.loads(k2("mock/model", "--dry-run", "--json").stdout)
    wanted = {name: len(data) for name, data in hub.files.items() if name != "modeling.py"}
    assert {file["name"]: file["missing_bytes"] for file in done["files"]} == wanted
    assert done["missing_bytes"] == sum(wanted.values())
    assert not (tmp_path / "hf" / "hub").exists()
    said = k2("mock/model", "--dry-run", "--only", "config", "--to", str(tmp_path / "a b")).stdout
    assert said.startswith(f"would download mock/model into {tmp_path / 'a b'}:\n")
    assert re.search(r"\d\d\d  bytes are free there\n", said)


def test_what_is_printed_can_be_copied(hub: MockHub, tmp_path: Path) -> None:
    done = k2("mock/model", "--to", str(tmp_path / "a b"))
    assert f"next: k2 plan-memory '{tmp_path / 'a b'}' --hardware" in done.stderr
    assert "      k2 launch mock/model@main\n" in k2("mock/model", "--revision", "main").stderr
    done = k2("mock/model", "--only", "config")
    size = len(hub.files["config.json"]) + len(hub.files["generation_config.json"])
    assert done.stdout.startswith("mock/model: the 2 chosen files are already in ")
    assert done.stdout.endswith(f" ({format_bytes(size)})\n")
    assert "hint: k2 download mock/model --json --events\n" in k2("mock/model", "--events").stderr
    assert k2("mock/model", "--limit-rate", "50MB/s").returncode == 0
    assert (
        "hint: k2 download mock/model --limit-rate 50M\n"
        in k2("mock/model", "--limit-rate", "x").stderr
    )
    assert "has no absent/other (HTTP 404)" in k2("absent/other").stderr


def test_a_branch_that_moves_does_not_mix_commits(hub: MockHub) -> None:
    old, first = dict(hub.files), hub.commit
    process = started(hub, 5_000_000, "--json")
    hub.moved(old | {WEIGHTS: weights(10_000_000, seed=2), "generation_config.json": b"{}"})
    said, _ = process.communicate(timeout=100)
    folder = Path(json.loads(said)["path"])
    assert folder.name == first
    assert (folder / WEIGHTS).read_bytes() == old[WEIGHTS]
    # The next one fetches the new commit, and of it only what differs.
    hub.sent.clear()
    is_right(folder_of(k2("mock/model", "--json")), hub)
    assert sum(hub.sent) < 11_000_000


def test_a_gated_repository(hub: MockHub) -> None:
    for environment in ({}, {"HF_TOKEN": "hf_withoutaccesswithoutaccess"}):
        done = k2("gated/model", **environment)
        assert done.returncode == 4
        assert f"{hub.address}/gated/model" in done.stderr
        assert "hf auth login" in done.stderr
        assert "withoutaccess" not in done.stderr
    done = k2("gated/model", "--json", HF_TOKEN=GOOD_TOKEN)
    assert (folder_of(done) / WEIGHTS).read_bytes() == hub.files[WEIGHTS]
    assert GOOD_TOKEN not in done.stdout + done.stderr


def test_offline_only_a_complete_copy_is_used(hub: MockHub) -> None:
    process = started(hub, 5_000_000)
    process.kill()
    process.communicate(timeout=20)
    done = k2("mock/model", HF_HUB_OFFLINE="1")
    assert done.returncode == 1
    assert "HF_HUB_OFFLINE is set" in done.stderr
    folder = folder_of(k2("mock/model", "--json"))
    there = k2("mock/model", "--json", HF_HUB_OFFLINE="1")
    assert folder_of(there) == folder
    assert "warning: the Hub was not asked for mock/model: HF_HUB_OFFLINE is set" in there.stderr
    # A damaged copy is named beside the reason why it is not downloaded again.
    os.truncate((folder / WEIGHTS).resolve(), 30_000_000)
    done = k2("mock/model", HF_ENDPOINT="http://127.0.0.1:9")
    assert done.returncode == 1
    assert "error: cannot fetch mock/model from the Hub: " in done.stderr
    assert "the copy on this machine is damaged: " in done.stderr
    assert "hint: check the network, and HF_ENDPOINT if you set it\n" in done.stderr


def test_a_volume_without_links(hub: MockHub, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library's layout for such volumes has the files themselves in the snapshot."""
    monkeypatch.setenv("HF_HUB_DISABLE_SYMLINKS", "1")
    folder = folder_of(k2("mock/model", "--json"))
    is_right(folder, hub)
    assert not any(path.is_symlink() for path in folder.iterdir())
    assert not any((folder.parent.parent / "blobs").iterdir())
    assert library("offline").stdout.strip() == str(folder)
    hub.requested.clear()
    assert json.loads(k2("mock/model", "--json").stdout)["was_there"]


@pytest.mark.slow
def test_a_full_disk_loses_nothing(
    hub: MockHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if os.geteuid() != 0 or sys.platform != "linux" or not mounted(tmp_path / "small", "48m"):
        pytest.skip("mounting a small file system needs root on Linux")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "small" / "hf"))
    filler = tmp_path / "small" / "filler"
    try:
        filler.write_bytes(bytes(20_000_000))
        done = k2("mock/model")
        assert done.returncode == 1
        assert "needs 40." in done.stderr
        assert "MB free" in done.stderr
        # There is room when it is checked, but no longer during the transfer.
        filler.unlink()
        process = started(hub, 5_000_000)
        fill(tmp_path / "small")
        _, said = process.communicate(timeout=100)
        assert process.returncode == 1
        assert "No space left on device" in said
        filler.unlink()
        hub.sent.clear()
        is_right(folder_of(k2("mock/model", "--json")), hub)
        assert sum(hub.sent) < 37_000_000
    finally:
        subprocess.run(["umount", "-l", str(tmp_path / "small")], check=True)


def test_events_are_json_lines(hub: MockHub) -> None:
    done = k2("mock/model", "--json", "--events", "--only", "config", "--only", "tokenizer")
    lines: list[dict[str, Any]] = [json.loads(line) for line in done.stdout.splitlines()]
    assert {line["schema_version"] for line in lines} == {1}
    assert lines[-1]["event"] == "result"
    files = {line["name"] for line in lines if line["event"] == "file"}
    assert files == {file["name"] for file in lines[-1]["files"]}
    assert "config.json" in files
    assert WEIGHTS not in files
    assert k2("mock/model", HF_HUB_OFFLINE="1").returncode == 1  # these files are no model


@pytest.mark.parametrize(
    "name", ["../../escape.safetensors", "/abs.safetensors", "a\\b.safetensors", "aux.safetensors"]
)
def test_names_that_leave_the_folder(hub: MockHub, tmp_path: Path, name: str) -> None:
    index = {"metadata": {}, "weight_map": {"t": name}}
    hub.files |= {name: hub.files.pop(WEIGHTS), "model.safetensors.index.json": b""}
    hub.files["model.safetensors.index.json"] = json.dumps(index).encode()
    done = k2("mock/model", "--to", str(tmp_path / "here"))
    assert done.returncode == 1, done.stderr
    assert "its name" in done.stderr or "is not the name of" in done.stderr
    assert not list(tmp_path.rglob("*.safetensors"))


@pytest.mark.parametrize(
    ("fault", "words"),
    [("is a page", "wants a login first"), ("names no file", "a file without name")],
)
def test_an_answer_that_is_no_list_is_no_bug(hub: MockHub, fault: str, words: str) -> None:
    hub.faults["list"] = fault
    done = k2("mock/model")
    assert (done.returncode, words in done.stderr) == (1, True), done.stderr
    # Nothing but the model is asked for, so that no other answer is kept either.
    assert all("/mock/model" in line for line in hub.requested), hub.requested


@pytest.mark.parametrize("revision", ["../../../escaped", "/escaped", "a/../../../../escaped"])
def test_a_revision_does_not_leave_the_cache(hub: MockHub, tmp_path: Path, revision: str) -> None:
    done = k2("mock/model", "--revision", revision, "--only", "config")
    assert (done.returncode, "no name of a revision" in done.stderr) == (2, True), done.stderr
    assert not list(tmp_path.rglob("escaped"))


@pytest.mark.parametrize("kind", ["folder", "link"])
def test_what_is_no_partial_file_is_named_with_what_helps(
    hub: MockHub, tmp_path: Path, kind: str
) -> None:
    blob = hashlib.sha256(hub.files[WEIGHTS]).hexdigest()  # type: ignore[arg-type]
    partial = tmp_path / "hf/hub/models--mock--model/blobs" / f"{blob}.partial"
    partial.parent.mkdir(parents=True)
    if kind == "folder":
        partial.mkdir()
    else:
        (tmp_path / "precious").write_text("precious")
        partial.symlink_to(tmp_path / "precious")
    done = k2("mock/model")
    assert done.returncode == 1, done.stderr
    hint = next(line for line in done.stderr.splitlines() if line.startswith("hint: "))
    command = hint.removeprefix("hint: move it away: ")
    subprocess.run(shlex.split(command), check=True, timeout=10)
    moved = Path(shlex.split(command)[-1])
    moved.rmdir() if kind == "folder" else moved.unlink()
    is_right(folder_of(k2("mock/model", "--json")), hub)
    if kind == "link":
        assert (tmp_path / "precious").read_text() == "precious"
