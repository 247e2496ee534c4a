"""Memory of a process as the system judges it, and what macOS counts about a process beside that.

The resident memory of macOS misses what is compressed, as that of idle processes is, and keeps what
was freed. The footprint is what Activity Monitor shows and what macOS ends processes by; it has a
GPU's memory too (libuv/libuv#5217, ml-explore/mlx#3896).
"""

from __future__ import annotations

import ctypes
import struct
import sys
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import psutil

# ``struct rusage_info_v2`` of <sys/resource.h>: a UUID, then 18 numbers.
_RUSAGE_V2 = struct.Struct("=16s18Q")
_LIBRARY = "/usr/lib/libproc.dylib"


class MacUse(NamedTuple):
    """The counts of macOS for a process: memory now, and bytes of the disk since its start."""

    wired_bytes: int
    footprint_bytes: int
    disk_bytes: int


def parse_use(data: bytes) -> MacUse:
    """Read a ``rusage_info_v2``."""
    _, *numbers = _RUSAGE_V2.unpack(data)
    return MacUse(numbers[5], numbers[7], numbers[16] + numbers[17])


def use_on_macos(pid: int) -> MacUse | None:
    """Return what macOS counts about a process; None if it has ended or is another user's."""
    usage = ctypes.create_string_buffer(_RUSAGE_V2.size)
    try:
        failed = ctypes.CDLL(_LIBRARY).proc_pid_rusage(pid, 2, usage) != 0
    except (OSError, AttributeError):
        return None
    return None if failed else parse_use(usage.raw)


def memory_of(process: psutil.Process) -> int:
    """Return the memory of a process in bytes: its footprint on macOS, elsewhere what is resident.

    Raises:
        psutil.Error: if it has ended or cannot be looked at.
    """
    if sys.platform == "darwin" and (use := use_on_macos(process.pid)) is not None:
        return use.footprint_bytes
    return int(process.memory_info().rss)
