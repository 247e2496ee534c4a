"""Runs of k2 that have processes on this machine now."""

from __future__ import annotations

import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import msgspec
import psutil

from k2cli.agent.freshness import boot_id
from k2cli.agent.run_processes import run_of
from k2cli.system.memory_use import memory_of
from k2cli.system.processes import command_of


class RunActivity(msgspec.Struct, frozen=True):
    """Number of processes of one run on one node, and the memory that they hold."""

    run_id: str
    processes: int
    resident_bytes: int


class Activity(msgspec.Struct, frozen=True):
    """All runs that have processes on a node."""

    runs: tuple[RunActivity, ...] = ()


def activity() -> Activity:
    """Find the processes of runs on this machine."""
    found: dict[str, list[int]] = defaultdict(list)
    for process in psutil.process_iter():
        run_id = run_of(command_of(process))
        try:
            if run_id is not None and process.status() != psutil.STATUS_ZOMBIE:
                found[run_id].append(memory_of(process))
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue  # it has ended, or is another user's
    runs = (RunActivity(run, len(sizes), sum(sizes)) for run, sizes in sorted(found.items()))
    return Activity(tuple(runs))


def start_of(pid: int) -> str:
    """Return a text that names the start of a process, and stays when the wall clock is set.

    On Linux, seconds since the epoch are derived from the present wall clock. macOS keeps the time
    that the clock showed at the start (``p_starttime``).

    Raises:
        psutil.NoSuchProcess: if there is no such process.
    """
    if sys.platform != "linux":
        return str(_kept_start(pid))
    try:
        boot = boot_id()
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        raise psutil.NoSuchProcess(pid) from None
    return f"{boot} {int(fields[19])}"  # clock ticks since boot


def _kept_start(pid: int) -> float:
    """Return the start of a process as macOS keeps it.

    ``psutil.Process.create_time`` of version 7.1 and later adds what the wall clock was set by
    since psutil was imported, so a supervisor that has run for long and a new command would
    disagree. psutil identifies processes by the value without it, which it has no public name for.
    """
    process: Any = psutil.Process(pid)._proc  # type: ignore[attr-defined]
    try:
        return float(process.create_time(monotonic=True))
    except TypeError:  # an earlier psutil, which adds nothing
        return float(process.create_time())


def is_alive(pid: int, create_time: float, start: str = "") -> bool:
    """True if the process with this id and start is still running.

    Args:
        pid: the id, which another process may have by now.
        create_time: its start in seconds since the epoch, used only without ``start``.
        start: its start as given by ``start_of``; earlier versions of k2 did not record it.
    """
    try:
        process = psutil.Process(pid)
        # psutil rounds to clock ticks; a process id is not reused within a second of its start.
        same = start_of(pid) == start if start else abs(process.create_time() - create_time) < 1.0
        return same and process.status() != psutil.STATUS_ZOMBIE
    except (psutil.NoSuchProcess, ValueError, OverflowError):  # no process has such an id
        return False
    except psutil.AccessDenied:
        return True
