"""Runs of k2 that have processes on this machine now."""

from __future__ import annotations

from collections import defaultdict

import msgspec
import psutil

from k2cli.agent.run_processes import run_of


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
        try:
            run_id = run_of(process.cmdline())
            if run_id is not None and process.status() != psutil.STATUS_ZOMBIE:
                found[run_id].append(int(process.memory_info().rss))
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue  # it has ended, or is another user's
    runs = (RunActivity(run, len(sizes), sum(sizes)) for run, sizes in sorted(found.items()))
    return Activity(tuple(runs))


def is_alive(pid: int, create_time: float) -> bool:
    """True if the process with this id and start time is still running."""
    try:
        process = psutil.Process(pid)
        # psutil rounds to clock ticks; a process id is not reused within a second of its start.
        same = abs(process.create_time() - create_time) < 1.0
        return same and process.status() != psutil.STATUS_ZOMBIE
    except (psutil.NoSuchProcess, ValueError, OverflowError):  # no process has such an id
        return False
    except psutil.AccessDenied:
        return True
