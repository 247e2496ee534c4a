"""Signs that a rank is at work although it completes no step: what the system counts about it.

A rank that compiles kernels or touches its weights for the first time is busy for minutes within
one step. Outside it shows as memory that the rank touches (a compiler in the process allocates all
the time), pages and files that are read, files that are written, and child processes. A rank that
waits shows nothing, or processor time alone: MLX's ring, MPI and CUDA wait by polling. So processor
time is counted apart.

On macOS, Metal's compiler is a service of the system and no child of the rank, and weights become
part of the process's wired memory; both are looked at.
"""

from __future__ import annotations

import contextlib
import sys
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from k2cli.guard.watchdog import NO_WORK, Work
from k2cli.settings import RUN_OPTION
from k2cli.system.memory_use import use_on_macos
from k2cli.system.processes import command_of, name_of

# The least of each that counts as work, for every second of an interval. Ranks that hung, or polled
# MLX's ring for one that did, showed up to 3 page faults a second and no other change. Few page
# faults are enough, because the kernel may give memory in huge pages.
_FIRST_TOUCHES_PER_SECOND = 20.0
_PAGES_READ_PER_SECOND = 8.0
_FILE_BYTES_PER_SECOND = 2.0**16
_GROWTH_BYTES_PER_SECOND = 2.0**24
_COMPILER_CORES = 0.05
"""Share of one core's time that compilers use."""

_OWN_CORES = 0.2
"""Share of one core's time that the rank uses itself."""

# MTLCompilerService, of which the system keeps 16 characters.
_COMPILER = "MTLCompilerServi"


@dataclass(frozen=True, slots=True)
class Counters:
    """Amounts that a process has used so far.

    Args:
        own_seconds: processor time of the process itself.
        first_touches: page faults without reading.
        pages_read: page faults for which a page was read.
        file_bytes: bytes of files that it read or wrote.
        held_bytes: memory that it holds; 0 on Linux, where first touches show its growth.
        compilers: processor seconds of each child that runs, by process id.
        ended_children_seconds: processor time of children that have ended.
    """

    own_seconds: float = 0.0
    first_touches: int = 0
    pages_read: int = 0
    file_bytes: int = 0
    held_bytes: int = 0
    compilers: dict[int, float] = field(default_factory=dict)
    ended_children_seconds: float = 0.0


def work_between(before: Counters, after: Counters, seconds: float) -> Work:
    """Return the signs of work in the time between two readings of the counters."""
    amounts = {
        "memory was touched for the first time": (
            (after.first_touches - before.first_touches) / _FIRST_TOUCHES_PER_SECOND
        ),
        "pages were read": (after.pages_read - before.pages_read) / _PAGES_READ_PER_SECOND,
        "files were read or written": (after.file_bytes - before.file_bytes)
        / _FILE_BYTES_PER_SECOND,
        "its memory grew": (after.held_bytes - before.held_bytes) / _GROWTH_BYTES_PER_SECOND,
        "compilers ran": _compiler_seconds(before, after) / _COMPILER_CORES,
    }
    signs = tuple(sign for sign, amount in amounts.items() if amount >= seconds)
    return Work(signs, after.own_seconds - before.own_seconds >= _OWN_CORES * seconds)


def _compiler_seconds(before: Counters, after: Counters) -> float:
    running = sum(
        seconds - before.compilers.get(pid, 0.0) for pid, seconds in after.compilers.items()
    )
    return running + after.ended_children_seconds - before.ended_children_seconds


class WorkProbe:
    """The work of one process, over intervals of at least ``interval_seconds``."""

    def __init__(self, pid: int, interval_seconds: float) -> None:
        self._pid = pid
        self._interval_seconds = interval_seconds
        self._before: tuple[float, Counters] | None = None

    def forget(self) -> None:
        """Begin again: the rank makes progress, so what it did before does not matter."""
        self._before = None

    def look(self, now: float) -> Work:
        """Return the signs of work since the last look, or no work if that was a moment ago."""
        if self._before is not None and now - self._before[0] < self._interval_seconds:
            return NO_WORK
        counters = _counters_of(self._pid)
        then = self._before
        self._before = (now, counters) if counters is not None else None
        if then is None or counters is None:
            return NO_WORK
        return work_between(then[1], counters, now - then[0])


def _counters_of(pid: int) -> Counters | None:
    try:
        return read_counters(psutil.Process(pid))
    except (psutil.Error, OSError):
        return None


def read_counters(process: psutil.Process) -> Counters | None:
    """Read what the system counts about a process and its descendants.

    None if the process is gone, or no file is left to look with.
    """
    try:
        times = process.cpu_times()
        compilers = {child.pid: _seconds_of(child) for child in _compilers(process)}
        faults = _darwin_faults if sys.platform == "darwin" else _linux_faults
        first_touches, pages_read, file_bytes, held_bytes = faults(process)
    except (psutil.Error, OSError):
        return None
    return Counters(
        times.user + times.system,
        first_touches,
        pages_read,
        file_bytes,
        held_bytes,
        compilers,
        times.children_user + times.children_system,
    )


def _compilers(process: psutil.Process) -> list[psutil.Process]:
    found = [child for child in process.children(recursive=True) if not _is_ours(child)]
    if sys.platform == "darwin":
        found += [each for each in psutil.process_iter() if name_of(each).startswith(_COMPILER)]
    return found


def _is_ours(process: psutil.Process) -> bool:
    """True for a process of the run, as the mask process is, which computes while a rank waits."""
    return RUN_OPTION in command_of(process)


def _seconds_of(process: psutil.Process) -> float:
    try:
        times = process.cpu_times()
    except (psutil.Error, OSError):
        return 0.0
    return times.user + times.system


def _linux_faults(process: psutil.Process) -> tuple[int, int, int, int]:
    """Read page faults without and with reading, and bytes of files; memory is in the faults."""
    folder = Path(f"/proc/{process.pid}")
    first_touches = pages_read = file_bytes = 0
    with contextlib.suppress(OSError):
        # The name, in parentheses, may contain anything.
        fields = (folder / "stat").read_text().rpartition(")")[2].split()
        first_touches, pages_read = int(fields[7]), int(fields[9])
    with contextlib.suppress(OSError):
        # Sockets are not in these two, since they are used with recv and send.
        lines = (folder / "io").read_text().splitlines()
        counts = dict(line.split(": ") for line in lines)
        file_bytes = int(counts["rchar"]) + int(counts["wchar"])
    return first_touches, pages_read, file_bytes, 0


def _darwin_faults(process: psutil.Process) -> tuple[int, int, int, int]:
    """Read the same on macOS, and wired memory and footprint, which grow as a GPU gets weights."""
    memory = process.memory_info()
    faults, pages = getattr(memory, "pfaults", 0), getattr(memory, "pageins", 0)
    use = use_on_macos(process.pid)
    if use is None:
        return faults, pages, 0, memory.rss
    return faults, pages, use.disk_bytes, use.wired_bytes + use.footprint_bytes
