"""All processes of a run are stopped for longer than every deadline, and continued."""

from __future__ import annotations

import os
import signal
import time

import pytest

from k2cli.protocol import Deadlines
from tests.support.harness import SupervisedRun, supervised

pytestmark = pytest.mark.ranks

DEADLINES = Deadlines(heartbeat_interval=0.5, liveness=2.0, stopped=2.0, step_stall=2.0)
STOPPED_SECONDS = 3.0
EARLIER_SECONDS = 0.7
BRIEFLY_SECONDS = 1.3  # longer than a process is late without having been stopped
WATCHED_SECONDS = 2.5


def everything(run: SupervisedRun) -> list[int]:
    """Return the ids of supervisor, mpirun, slots, guards and ranks, parents first."""
    return [run.supervisor.pid, *sorted(process.pid for process in run.processes())]


def send(number: signal.Signals, pids: list[int]) -> None:
    for pid in pids:
        os.kill(pid, number)


def pause(pids: list[int], first: set[int]) -> None:
    """Stop processes, the first ones last; continue those earlier than the others."""
    early, late = (
        [pid for pid in pids if (pid in first) == is_first] for is_first in (True, False)
    )
    send(signal.SIGSTOP, late + early)
    time.sleep(STOPPED_SECONDS)
    send(signal.SIGCONT, early)
    time.sleep(EARLIER_SECONDS)
    send(signal.SIGCONT, late)


def test_a_run_continues_in_whatever_order_its_processes_do() -> None:
    with supervised("mpi", deadlines=DEADLINES) as run:
        run.wait_ready()
        pids = everything(run)
        guards = [run.pid_of(f"guard-{rank}") for rank in (0, 1)]
        pause(pids, first={run.supervisor.pid})
        pause(pids, first=set(guards))
        send(signal.SIGSTOP, guards)
        time.sleep(BRIEFLY_SECONDS)
        send(signal.SIGCONT, guards)
        time.sleep(WATCHED_SECONDS)
        assert run.record.state == "ready", run.record.cause
        assert everything(run) == pids
        # One that stays stopped while the others run still ends the run.
        send(signal.SIGSTOP, guards[1:])
        assert run.supervisor.wait(20) == 5
        cause = run.record.cause
    assert cause == "rank 1 on localhost failed: its guard is gone: it was silent for 2 s"
