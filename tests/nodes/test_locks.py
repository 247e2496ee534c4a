"""Locks of machines: one run at a time, sharing if memory allows, and stale ones."""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path
from typing import Any

import msgspec
import pytest
from typer.main import get_command

from k2cli.agent import locks as lock_files
from k2cli.agent.locks import Claim, lock_path, lock_state
from k2cli.agent.run_processes import processes_of_run
from k2cli.cli import build_app
from k2cli.commands.whole_hint import whole_hint
from k2cli.errors import ClusterError
from k2cli.nodes import locks
from k2cli.nodes.local import LocalNode
from k2cli.nodes.locks import BusyError, RankNeed, release_locks, take_locks
from k2cli.runs import clean as cleaning
from k2cli.runs.record import RankRecord, RunRecord, save_record

HERE = [LocalNode(), LocalNode()]
NEEDS = {"localhost": [RankNeed(30, 50), RankNeed(30, 50)]}


def test_a_second_run_is_refused_by_the_name_of_the_first_until_that_ends() -> None:
    take_locks(HERE, "demo-1", NEEDS)
    with pytest.raises(BusyError, match="node localhost is in use by demo-1 of") as raised:
        take_locks(HERE, "demo-2", NEEDS)
    assert raised.value.exit_code == 5
    hint = whole_hint(
        get_command(build_app("launch")), ["launch", "demo", "--json"], raised.value.hint or ""
    )
    assert "k2 launch demo --json --wait 600; or if both fit: k2 launch demo --json --share" in hint
    assert hint.endswith("k2 stop demo-1")
    with pytest.raises(BusyError, match="both do not fit"):
        take_locks(HERE, "demo-2", NEEDS, share=True)
    take_locks(HERE, "demo-3", {"localhost": [RankNeed(40, 100)]}, share=True)
    for run_id in ("demo-1", "demo-3"):
        release_locks(HERE, run_id)
    take_locks(HERE, "demo-2", NEEDS)


@pytest.mark.parametrize("loss", [KeyboardInterrupt, ClusterError("it did not answer in time")])
def test_a_lock_whose_answer_is_lost_is_released(loss: type[BaseException] | ClusterError) -> None:
    class Far(LocalNode):
        def ask(self, kind: Any, verb: str, *arguments: str, **options: Any) -> Any:
            answer = super().ask(kind, verb, *arguments, **options)
            if verb == "lock-take":
                assert lock_path("demo-1").exists()
                raise loss
            return answer

    with pytest.raises((KeyboardInterrupt, ClusterError)):
        take_locks([Far()], "demo-1", NEEDS)
    assert not lock_path("demo-1").exists()


def test_waiting_ends_with_the_other_run(monkeypatch: pytest.MonkeyPatch) -> None:
    take_locks(HERE, "demo-1", NEEDS)
    said: list[str] = []
    waits: list[float] = []

    def sleep(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == 3:
            release_locks(HERE, "demo-1")

    monkeypatch.setattr(locks.time, "sleep", sleep)
    take_locks(HERE, "demo-2", NEEDS, wait_seconds=60, say=said.append)
    assert len(said) == 1  # not at every look, though each finds another age of the run
    assert "demo-1" in said[0]


def test_a_lock_whose_supervisor_is_gone_is_removed_and_named() -> None:
    claim = Claim("old-1", "jane", socket.gethostname(), 2**22 + 1, 0.0)
    lock_path("old-1").parent.mkdir(parents=True)
    lock_path("old-1").write_bytes(msgspec.json.encode(claim))
    said: list[str] = []
    take_locks(HERE, "demo-1", NEEDS, say=said.append)
    assert said == ["node localhost: removed the lock of old-1, which has ended"]
    assert not lock_path("old-1").exists()


@pytest.mark.parametrize(
    ("here", "alive", "age", "processes", "state"),
    [
        (True, True, 1e6, 0, "held"),
        (True, False, 0.0, 0, "stale"),
        (True, False, 0.0, 2, "left over"),
        (False, False, 10.0, 0, "held"),
        (False, False, 61.0, 0, "stale"),
        (False, False, 61.0, 2, "left over"),
    ],
)
def test_state_of_a_lock(here: bool, alive: bool, age: float, processes: int, state: str) -> None:
    assert lock_state(age, alive, processes, here=here) == state


def test_cleaning_removes_what_is_stale_and_nothing_that_lives(tmp_path: Path) -> None:
    take_locks(HERE, "demo-1", NEEDS)
    far = Claim("far-1", "jane", "laptop", 1, 0.0)
    lock_path("far-1").write_bytes(msgspec.json.encode(far))
    os.utime(lock_path("far-1"), (time.time() - 100,) * 2)
    (report,) = cleaning.clean(HERE)
    assert [run.run_id for run in report.cleared] == ["far-1"]
    assert report.cleared[0].removed_lock
    assert lock_files.lock_path("demo-1").exists()
    assert processes_of_run("far-1") == []


def test_the_launchers_record_overrides_a_fresh_lock() -> None:
    """A killed launcher's lock looks fresh for a minute on another machine."""
    for run_id in ("far-1", "far-2"):
        lock_path(run_id).parent.mkdir(parents=True, exist_ok=True)
        lock_path(run_id).write_bytes(msgspec.json.encode(Claim(run_id, "jane", "laptop", 1, 0.0)))
    (report,) = cleaning.clean(HERE)
    assert report.cleared == ()
    record = RunRecord(
        "far-1", "demo", "demo", "failed", "ring", "pipeline", 8, (RankRecord(0, "localhost"),), 1.0
    )
    record.folder.mkdir(parents=True)
    save_record(record)
    (report,) = cleaning.clean(HERE)
    assert [run.run_id for run in report.cleared] == ["far-1"]
    assert lock_path("far-2").exists()
