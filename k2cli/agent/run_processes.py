"""Processes of a run on this machine, recognised by their command lines.

Guards, ranks and MPI slots have ``--k2-run RUN_ID``; mpirun and its daemons have a setting with
that value. Only whole arguments count: a shell or an editor that mentions a run in a longer
argument is not part of it. A supervisor has no such mark: ``kill_run`` does not end it.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import suppress
from itertools import pairwise

import msgspec
import psutil

from k2cli.pauses import Deadline
from k2cli.settings import RUN_OPTION
from k2cli.system.processes import command_of

# A setting without a meaning to mpirun, which passes it on to its daemons.
MPI_SETTING = "k2cli_run_id"
# Before --k2-run, the mark was an argument with this prefix, and the run's id followed --run.
_OLD_MARK = "k2cli.runtime"
_KILL_SECONDS = 5.0


class RunProcess(msgspec.Struct, frozen=True):
    """A process that belongs to a run."""

    pid: int
    command: str


def run_of(command: Sequence[str]) -> str | None:
    """Return the id of the run that a process with this command line belongs to, or None."""
    marks = {RUN_OPTION, MPI_SETTING}
    if any(part.startswith(_OLD_MARK) for part in command):
        marks |= {"--run", _OLD_MARK}
    found = (value for mark, value in pairwise(command) if mark in marks)
    # An option follows the old mark where it was an argument of Python (-X).
    return next((run_id for run_id in found if not run_id.startswith("-")), None)


def processes_of_run(run_id: str) -> list[RunProcess]:
    """Find the guards, ranks and MPI processes of a run on this node. Zombies do not count."""
    found = []
    for process in psutil.process_iter():
        command = command_of(process)
        try:
            if run_of(command) == run_id and process.status() != psutil.STATUS_ZOMBIE:
                found.append(RunProcess(process.pid, " ".join(command)))
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue  # it has ended, or is another user's
    return found


def kill_run(run_id: str, spared: int | str = 0) -> list[RunProcess]:
    """Kill every process of a run on this node except ``spared``, and wait until they have ended.

    Returns:
        Processes that are still there: those that hang in the kernel, or are another user's.
    """
    limit = Deadline(_KILL_SECONDS)
    while (left := _others(run_id, int(spared))) and not limit.has_passed:
        for process in left:
            try:
                found = psutil.Process(process.pid)
                children = found.children(recursive=True)  # compilers do not carry the mark
                found.kill()
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
            for child in children:
                with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                    if child.pid != int(spared):
                        child.kill()
        time.sleep(0.05)
    return left


def _others(run_id: str, spared: int) -> list[RunProcess]:
    return [process for process in processes_of_run(run_id) if process.pid != spared]


def count_processes(run_id: str) -> int:
    """Count the processes of a run on this node."""
    return len(processes_of_run(run_id))
