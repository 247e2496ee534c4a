"""Damaged and hostile records in the state folder."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import psutil
import pytest

from k2cli.agent.activity import is_alive
from k2cli.agent.clean import clean_machine
from k2cli.errors import K2Error
from k2cli.runs import record as records
from k2cli.runs.record import (
    KEPT_RECORDS,
    RankRecord,
    RunRecord,
    find_run,
    list_runs,
    prune_records,
    read_record,
    save_record,
)
from k2cli.settings import RUN_OPTION, runs_directory, state_directory

GOOD = RunRecord(
    "demo-1", "demo", "demo", "stopped", "local", "single", 8, (RankRecord(0, "localhost"),), 1e9
)
CHANGES: list[dict[str, Any]] = [
    {"run_id": ".."}, {"run_id": "."}, {"run_id": ""}, {"run_id": "demo-1/../.."},
    {"run_id": "/tmp"}, {"run_id": "demo-1"}, {"run_id": "-rf"}, {"run_id": "a\nb"},
    {"pid": -5}, {"pid": -1}, {"pid": 2**70}, {"pid": "x"}, {"created": None},
    {"state": "unknown"}, {"schema_version": 99}, {"ranks": [{"rank": 0, "node": "-x"}]},
    {"ranks": [{"rank": 0, "node": "-oProxyCommand=touch x"}]},
    {"ranks": [{"rank": 0, "node": ""}]}, {"ranks": [{"rank": 0, "node": "a b"}]},
]  # fmt: skip
DAMAGED = [b"", b"{", b"null", b"\xff\xfe", b"[" * 10**6, b'{"x":' * 10**6, b" " * (5 * 2**20)]


def document(changes: dict[str, Any], state: str = "ready") -> bytes:
    fields = json.loads(msgspec.json.encode(replace(GOOD, run_id="bad-1"))) | {"state": state}
    return json.dumps(fields | changes).encode()


def plant(data: bytes, name: str = "bad-1") -> Path:
    folder = runs_directory() / name
    folder.mkdir(parents=True)
    (folder / "run.json").write_bytes(data)
    return folder


def good(run_id: str = "demo-1", **changes: Any) -> RunRecord:
    record = replace(GOOD, run_id=run_id, **changes)
    record.folder.mkdir(parents=True)
    save_record(record)
    return record


def everything() -> set[Path]:
    return set(state_directory().parent.rglob("*"))


def k2(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "k2cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)


@pytest.mark.parametrize("state", ["ready", "stopped", "orphaned"])
@pytest.mark.parametrize("changes", CHANGES, ids=str)
def test_a_hostile_record_is_named_and_skipped(changes: dict[str, Any], state: str) -> None:
    kept = good()
    for number in range(KEPT_RECORDS + 1):
        good(f"old-{number}", created=2e9 + number)  # younger: only the hostile one is pruned
    folder = plant(document(changes, state))
    if changes == {"pid": 2**70}:
        assert {run.run_id for run in list_runs()} >= {"demo-1", "bad-1"}  # such a process is gone
        return
    before = everything()
    said: list[str] = []
    assert "bad-1" not in {run.run_id for run in list_runs(lambda _, text: said.append(text))}
    assert [str(folder) in line for line in said] == [True]
    with pytest.raises(K2Error, match=r"bad-1.*left out"):
        find_run("bad-1")
    clean_machine(frozenset())
    prune_records()
    # The locks folder may have been made.
    removed = {path.parent for path in before - everything()} - {runs_directory()}
    assert removed <= {kept.folder, runs_directory() / "old-0"}


@pytest.mark.parametrize("data", DAMAGED, ids=lambda data: repr(data[:8]))
def test_a_damaged_record_is_named_and_skipped(data: bytes) -> None:
    kept, said = good(), list[str]()
    plant(data)
    assert list_runs(lambda _, text: said.append(text)) == [kept]
    assert len(said) == 1
    assert "bad-1" in said[0]


def test_a_fifo_a_device_and_a_link_are_not_read() -> None:
    kept, said = good(), list[str]()
    for name in ("fifo", "device", "link", "folder"):
        (runs_directory() / name).mkdir()
    os.mkfifo(runs_directory() / "fifo" / "run.json")
    (runs_directory() / "device" / "run.json").symlink_to("/dev/zero")
    (runs_directory() / "link" / "run.json").symlink_to(kept.folder / "run.json")
    (runs_directory() / "folder" / "run.json").mkdir()
    assert list_runs(lambda _, text: said.append(text)) == [kept]
    assert len(said) == 4
    assert k2("ps").stderr.count("left out") == 4


def test_a_linked_folder_is_left_alone(tmp_path: Path) -> None:
    """Without this, the end of the run removes the key file of the folder's owner."""
    runs_directory().mkdir(parents=True)
    plant(document({"pid": 2**22 + 1}))
    (runs_directory() / "bad-1").rename(tmp_path / "bad-1")
    (runs_directory() / "bad-1").symlink_to(tmp_path / "bad-1")
    (tmp_path / "bad-1" / "api-key").touch()
    assert list_runs() == []
    clean_machine(frozenset())
    assert (tmp_path / "bad-1" / "api-key").exists()


def test_folders_in_place_of_the_files_of_a_run_do_not_stop_its_reader() -> None:
    record = good(state="ready", pid=2**22 + 1)
    for name in ("api-key", "launch.json", "bootstrap-0.json"):
        (record.folder / name).mkdir()
    (lost,) = list_runs()
    assert lost.state == "lost"


@pytest.mark.parametrize("run_id", ["..", "a/b", "", "-x", "/tmp"])
def test_no_record_is_written_outside_a_folder_of_its_own(run_id: str) -> None:
    with pytest.raises(ValueError, match="cannot be the id of a run"):
        save_record(replace(GOOD, run_id=run_id))


@pytest.mark.parametrize("pid", [-5, -1, 0, 2**31, 2**63, 2**200])
def test_an_impossible_process_is_not_alive(pid: int) -> None:
    assert not is_alive(pid, 0.0)


def test_thousands_of_records_are_listed_and_removed_in_bounded_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for number in range(3_000):
        folder = runs_directory() / f"old-{number}"
        folder.mkdir(parents=True)
        data = msgspec.json.encode(replace(GOOD, run_id=folder.name, created=1e9 + number))
        (folder / "run.json").write_bytes(data)
    clock = itertools.count()  # a second passes at each look
    with monkeypatch.context() as patched:
        patched.setattr(records, "time", SimpleNamespace(monotonic=lambda: next(clock)))
        patched.setattr(records, "_PRUNE_SECONDS", 100)
        prune_records()
    left = list_runs()
    assert len(left) == 2_900
    assert left[0].run_id == "old-2999"


def test_one_look_at_the_processes_serves_all_runs_whose_supervisors_are_gone() -> None:
    lost = [good(f"lost-{number}", state="ready", pid=2**22 + 1) for number in range(100)]
    orphaned = good("orphaned-1", state="ready", pid=2**22 + 1)
    command = [sys.executable, "-c", "import time; time.sleep(60)", RUN_OPTION, orphaned.run_id]
    with subprocess.Popen(command) as process:
        try:
            while orphaned.run_id not in " ".join(psutil.Process(process.pid).cmdline()):
                time.sleep(0.01)
            with pytest.MonkeyPatch.context() as patch:
                looked = list[str]()
                look = records.remaining_processes
                patch.setattr(
                    records,
                    "remaining_processes",
                    lambda run: looked.append(run.run_id) or look(run),
                )
                states = {run.run_id: run.state for run in list_runs()}
        finally:
            with suppress(ProcessLookupError):
                process.kill()
    assert looked == [orphaned.run_id]
    assert states == {run.run_id: "lost" for run in lost} | {orphaned.run_id: "orphaned"}


def test_ps_prints_times_that_no_clock_shows() -> None:
    good("demo-1", created=-1e308)
    good("demo-2", created=1e308, ended=-1e308)
    done = k2("ps")
    assert done.returncode == 0, done.stderr
    assert read_record(runs_directory() / "demo-1") is not None


@pytest.mark.parametrize("wanted", ["", "runs", "other"])
def test_a_damaged_record_is_not_blamed_for_another_name(wanted: str) -> None:
    folder = runs_directory() / "bad-1234"
    folder.mkdir(parents=True)
    (folder / "run.json").write_text("{")
    with pytest.raises(K2Error, match="there is no run"):
        find_run(wanted)
    with pytest.raises(K2Error, match="is left out"):
        find_run("bad-12")
