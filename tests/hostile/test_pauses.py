"""All processes of a run are stopped for longer than every deadline, and continued."""

from __future__ import annotations

import os
import signal
import time

import pytest

from k2cli.protocol import Deadlines
from tests.support.harness import SupervisedRun, supervised

pytestmark = pytest.mark.ranks

DEADLINES = Deadlines(
    heartbeat_interval=0.5, liveness=2.5, initialisation=2.5, stopped=2.5, step_stall=2.5
)
STOPPED_SECONDS = 4.0
STAGGER_SECONDS = 1.0
WATCHED_SECONDS = 3.0


def everything(run: SupervisedRun) -> list[int]:
    """Return the ids of supervisor, mpirun, slots, guards and ranks, parents first."""
    return [run.supervisor.pid, *sorted(process.pid for process in run.processes())]


def pause(first: list[int], then: list[int]) -> None:
    """Stop processes; continue some of them a second before the others."""
    for pid in then + first:
        os.kill(pid, signal.SIGSTOP)
    time.sleep(STOPPED_SECONDS)
    for pid in first:
        os.kill(pid, signal.SIGCONT)
    time.sleep(STAGGER_SECONDS)
    for pid in then:
        os.kill(pid, signal.SIGCONT)


def test_a_run_continues_in_whatever_order_its_processes_do() -> None:
    with supervised("mpi", deadlines=DEADLINES) as run:
        run.wait_ready()
        pids = everything(run)
        guards_first = {run.pid_of(f"guard-{rank}") for rank in (0, 1)}
        for first in (set(pids), {run.supervisor.pid}, guards_first):
            pause([pid for pid in pids if pid in first], [pid for pid in pids if pid not in first])
        time.sleep(WATCHED_SECONDS)
        assert run.record.state == "ready", run.record.cause
        assert everything(run) == pids
        # One that stays stopped while the others run still ends the run.
        os.kill(run.pid_of("guard-1"), signal.SIGSTOP)
        assert run.supervisor.wait(20) == 5
        assert (
            run.record.cause
            == "rank 1 on localhost failed: its guard is gone: it was silent for 2 s"
        )
