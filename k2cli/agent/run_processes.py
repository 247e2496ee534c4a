"""The processes of a run on this machine, which are recognised by their command lines.

Guards, ranks and MPI seats carry ``--k2-run RUN_ID``; mpirun and its daemons carry a setting with
that value. Only whole arguments count: a shell or an editor that mentions a run in a longer
argument is not part of it. A supervisor carries no mark: ``kill_run`` leaves it alone.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import pairwise

import msgspec
import psutil

from k2cli.settings import RUN_OPTION

# A setting that means nothing to mpirun, which passes it on to its daemons.
MPI_SETTING = "k2cli_run_id"
# Before --k2-run, the mark was an argument that begins so, and the run's id followed --run.
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
    """Guards, ranks and MPI launchers of a run that live on this node. Zombies do not count."""
    found = []
    for process in psutil.process_iter():
        try:
            command = process.cmdline()
            if run_of(command) == run_id and process.status() != psutil.STATUS_ZOMBIE:
                found.append(RunProcess(process.pid, " ".join(command)))
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue  # gone meanwhile, or another user's
    return found


def kill_run(run_id: str, spared: int | str = 0) -> list[RunProcess]:
    """SIGKILL every process of a run on this node but ``spared``, and wait until they are gone.

    Returns:
        What is still there: only what hangs in the kernel, or is another user's.
    """
    until = time.monotonic() + _KILL_SECONDS
    while (left := _others(run_id, int(spared))) and time.monotonic() < until:
        for process in left:
            try:
                psutil.Process(process.pid).kill()
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
        time.sleep(0.05)
    return left


def _others(run_id: str, spared: int) -> list[RunProcess]:
    return [process for process in processes_of_run(run_id) if process.pid != spared]


def count_processes(run_id: str) -> int:
    """How many processes of a run live here."""
    return len(processes_of_run(run_id))
