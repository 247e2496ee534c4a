"""How fast this machine reads a checkpoint's own files, past the cache where the system allows.

Linux reads with ``O_DIRECT``. macOS is asked by ``F_NOCACHE`` not to keep what is read; it may
still give what it had kept before, so there the figure can be too good, and says so.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import random
import sys
import time
from pathlib import Path

import msgspec

_BLOCK_BYTES = 2**24
_LIMIT_BYTES = 2**31
_LIMIT_SECONDS = 2.0
_SMALLEST_BYTES = 2**20


class DiskReading(msgspec.Struct, frozen=True):
    """What was read in which time; ``error`` says why nothing was."""

    path: str
    read_bytes: int = 0
    seconds: float = 0.0
    uncached: bool = False
    error: str | None = None


def read_speed(folder: str) -> DiskReading:
    """Read from the largest safetensors file at or below a folder, for two seconds at most."""
    try:
        file = largest_weights(Path(folder).expanduser())
        if file is None:
            return DiskReading(folder, error=f"no safetensors file of 1 MiB or more in {folder}")
        return _read(file)
    except OSError as error:
        return DiskReading(folder, error=f"{error.strerror or error}: {folder}")


def largest_weights(folder: Path) -> Path | None:
    """The largest safetensors file in a folder of models or in a checkpoint."""
    found = [path for path in folder.rglob("*.safetensors") if path.is_file()]
    big = [path for path in found if path.stat().st_size >= _SMALLEST_BYTES]
    return max(big, key=lambda path: path.stat().st_size, default=None)


def _read(path: Path) -> DiskReading:
    descriptor, uncached = _open(path)
    try:
        size = path.stat().st_size
        # A random place, so that a second try does not only find what the first one left.
        last = max(0, size - _LIMIT_BYTES) // _BLOCK_BYTES
        offset = random.randint(0, last) * _BLOCK_BYTES
        buffer = mmap.mmap(-1, _BLOCK_BYTES)  # page-aligned, as O_DIRECT wants it
        began, total = time.perf_counter(), 0
        while total < _LIMIT_BYTES and time.perf_counter() - began < _LIMIT_SECONDS:
            count = os.preadv(descriptor, [buffer], offset)
            if count <= 0:
                break
            total += count
            offset += count
            if count < _BLOCK_BYTES:
                break  # the end; the next offset would not be aligned
        return DiskReading(str(path), total, time.perf_counter() - began, uncached)
    finally:
        os.close(descriptor)


def _open(path: Path) -> tuple[int, bool]:
    """A descriptor that avoids the cache if possible, and whether it surely does."""
    if sys.platform == "linux":
        try:
            return os.open(path, os.O_RDONLY | os.O_DIRECT), True
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise  # EINVAL: a file system without it, such as tmpfs
            return os.open(path, os.O_RDONLY), False
    descriptor = os.open(path, os.O_RDONLY)
    no_cache = getattr(fcntl, "F_NOCACHE", None)
    if no_cache is not None:
        fcntl.fcntl(descriptor, no_cache, 1)
    return descriptor, False
