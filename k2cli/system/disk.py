"""Room on a disk.

The ``statvfs`` of macOS counts blocks in 32 bits, so that a disk of 16 TiB, or a network share of
2 or 4, looks almost full. Python avoids it from 3.13 on (python/cpython#87804); its ``statfs``
counts in 64.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import struct
import sys
from pathlib import Path
from typing import NamedTuple

# ``struct statfs`` of <sys/mount.h>: the sizes of a block and of a transfer, then the blocks in
# all, those that are free, and those that are free for users; 2168 bytes in all.
_STATFS = struct.Struct("=Ii3Q")
_STATFS_BYTES = 2168
_LIBRARY = "/usr/lib/libSystem.B.dylib"


class DiskUse(NamedTuple):
    """Size of a disk, and what this user may still write to it."""

    total: int
    free: int


def disk_use(path: Path) -> DiskUse:
    """Return the size of the disk that a path is on, and its room, in bytes.

    Raises:
        OSError: if the path cannot be examined.
    """
    if sys.platform == "darwin" and (use := _use_on_macos(path)) is not None:
        return use
    usage = shutil.disk_usage(path)
    return DiskUse(usage.total, usage.free)


def parse_statfs(data: bytes) -> DiskUse:
    """Read a ``struct statfs`` of macOS."""
    block, _, blocks, _, free = _STATFS.unpack_from(data)
    return DiskUse(blocks * block, free * block)


def _use_on_macos(path: Path) -> DiskUse | None:
    found = ctypes.create_string_buffer(_STATFS_BYTES)
    try:
        failed = ctypes.CDLL(_LIBRARY).statfs(os.fsencode(path), found) != 0
    except (OSError, AttributeError):
        return None
    return None if failed else parse_statfs(found.raw)
