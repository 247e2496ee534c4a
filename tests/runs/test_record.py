"""Test the records of runs, and the states of runs whose supervisor is gone."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from typing import Any

import psutil
import pytest

from k2cli.agent import run_processes
from k2cli.errors import K2Error
from k2cli.runs import check_run
from k2cli.runs import record as records
from k2cli.runs.lease import hold
from k2cli.runs.record import (
    KEPT_RECORDS,
    RankRecord,
    RunRecord,
    RunState,
    find_run,
    list_runs,
    new_run_id,
    prune_records,
    read_record,
    save_record,
)
from k2cli.runs.stop import stop_run
from k2cli.settings import RUN_OPTION


def make_record(state: RunState = "ready", *, age: float = 0.0) -> RunRecord:
    """Record a run whose supervisor is this process."""
    own = psutil.Process()
    record = RunRecord(
        run_id=new_run_id("HuggingFaceTB/SmolLM2 135M"),
        model="demo",
        model_name="demo",
        state=state,
        backend="local",
        strategy="single",
        context_length=128,
        ranks=(RankRecord(0, "localhost"),),
        created=time.time() - age,
        pid=own.pid,
        pid_create_time=own.create_time(),
    )
    record.folder.mkdir(parents=True)
    save_record(record)
    return record


def test_of_several_runs_of_a_name_the_live_one_is_meant() -> None:
    """``k2 stop demo`` and ``k2 logs demo``, after demo was launched and stopped some times."""
    older, newer = make_record("stopped", age=20), make_record("stopped", age=10)
    with pytest.raises(K2Error, match="several runs"):
        find_run("smollm2")
    assert find_run("smollm2", live=False) == newer
    live = make_record(age=30)
    assert find_run("smollm2") == find_run("smollm2", live=False) == live
    assert find_run(older.run_id) == older
    make_record(age=40)
    for is_live in (True, False):
        with pytest.raises(K2Error, match="several runs"):
            find_run("smollm2", live=is_live)


def test_a_record_survives_the_way_to_disk_and_back() -> None:
    record = make_record()
    assert record.run_id.startswith("smollm2-135m-")
    assert read_record(record.folder) == record
    assert list_runs() == [record]
    assert find_run() == record
    assert find_run(record.run_id[:10]) == record


def test_newest_first_and_damaged_records_are_left_out() -> None:
    old, new = make_record(age=100), make_record(age=1)
    (old.folder.parent / "broken").mkdir()
    (old.folder.parent / "broken" / "run.json").write_text("{")
    assert [run.run_id for run in list_runs()] == [new.run_id, old.run_id]
    with pytest.raises(K2Error, match="several runs"):
        find_run("smollm2")


def test_a_check_run_is_forgotten_only_if_it_is_over_and_nobody_needs_it() -> None:
    gone: dict[str, Any] = {
        "pid": os.getpid(),
        "pid_create_time": time.time() - 1e6,
    }  # another process's
    cases: list[tuple[RunState, dict[str, str], bool]] = [
        ("failed", {}, True),  # its log tells why
        ("stopped", {"localhost": "1 process"}, True),
        ("stopped", {}, False),
        ("lost", {}, False),
    ]
    for state, left, kept in cases:
        record = replace(make_record(state), left=left, ends_with_check=True, **gone)
        save_record(record)
        assert check_run.is_over(record) is not kept
        lease = hold(record.folder)
        assert lease is not None
        if not kept:  # the check itself still reads it
            assert list_runs() == []
            assert record.folder.exists()
        lease.close()
        assert [run.run_id for run in list_runs()] == ([record.run_id] if kept else [])
        assert record.folder.exists() is kept
        shutil.rmtree(record.folder, ignore_errors=True)


def test_without_a_supervisor_a_run_is_lost() -> None:
    # A live process that is younger than the supervisor: its id was used again.
    record = replace(make_record(), pid=os.getpid(), pid_create_time=time.time() - 1e6)
    save_record(record)
    (record.folder / "launch.json").write_text("secret")
    (lost,) = list_runs()
    assert lost.state == "lost"
    assert lost.ended is not None
    assert not (record.folder / "launch.json").exists()
    assert list_runs() == [lost]
    with pytest.raises(K2Error, match="no run is live"):
        find_run()
    assert find_run(live=False) == lost


def test_without_a_supervisor_but_with_processes_a_run_is_orphaned() -> None:
    record = replace(make_record(), pid=2**22 + 1)
    save_record(record)
    command = [sys.executable, "-c", "import time; time.sleep(60)"]
    with subprocess.Popen([*command, RUN_OPTION, record.run_id]) as process:
        while not run_processes.processes_of_run(record.run_id):
            time.sleep(0.01)
        (orphaned,) = list_runs()
        assert orphaned.state == "orphaned"
        assert "1 process(es) remain on localhost" in orphaned.cause
        assert run_processes.kill_run(record.run_id) == []
        assert process.wait(5) == -9
    assert list_runs()[0].state == "lost"


def test_stopping_an_orphaned_run_ends_what_remains() -> None:
    record = replace(make_record(), pid=2**22 + 1)
    save_record(record)
    command = [sys.executable, "-c", "import time; time.sleep(60)"]
    with subprocess.Popen([*command, RUN_OPTION, record.run_id]) as process:
        while not run_processes.processes_of_run(record.run_id):
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGSTOP)
        report = stop_run(list_runs()[0])
        assert process.wait(5) == -9
    assert (report.state, report.killed) == ("stopped", 1)
    assert list_runs()[0].state == "stopped"


def test_old_records_are_removed_and_live_ones_kept() -> None:
    live = make_record(age=10_000)
    ended = [make_record("stopped", age=float(age)) for age in range(KEPT_RECORDS + 3)]
    prune_records()
    kept = {run.run_id for run in list_runs()}
    assert kept == {live.run_id, *(run.run_id for run in ended[:KEPT_RECORDS])}


def test_a_run_that_its_supervisor_takes_over_while_it_is_looked_at_is_not_lost(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its launcher was killed just after it had started that process."""
    taken_over = make_record("starting")
    secret = taken_over.folder / "launch.json"
    secret.write_text("{}")
    save_record(replace(taken_over, pid=2**22 + 1))

    def look(record: RunRecord) -> dict[str, list[str]]:
        save_record(taken_over)
        return {}

    monkeypatch.setattr(records, "remaining_processes", look)
    assert [run.state for run in list_runs()] == ["starting"]
    assert read_record(taken_over.folder) == taken_over
    assert secret.exists()
