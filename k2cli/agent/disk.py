"""Measurement of the speed at which this machine reads a checkpoint's own files.

On Linux ``O_DIRECT`` bypasses the page cache. On macOS ``F_NOCACHE`` keeps the data out of the
cache, but data that were cached before may still be returned: the figure can be too high there,
and ``DiskReading.uncached`` is False.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import random
import stat
import sys
import time
from contextlib import suppress
from pathlib import Path

import msgspec

from k2cli.files import open_regular
from k2cli.settings import expand_home

_BLOCK_BYTES = 2**24
_LIMIT_BYTES = 2**31
_LIMIT_SECONDS = 2.0
_SMALLEST_BYTES = 2**20


class DiskReading(msgspec.Struct, frozen=True):
    """Number of bytes read and the time taken; ``error`` is the reason if nothing was read."""

    path: str
    read_bytes: int = 0
    seconds: float = 0.0
    uncached: bool = False
    error: str | None = None


def read_speed(folder: str) -> DiskReading:
    """Read from the largest safetensors file at or below a folder, for two seconds at most."""
    try:
        file = largest_weights(expand_home(folder))
        if file is None:
            return DiskReading(folder, error=f"no safetensors file of 1 MiB or more in {folder}")
        return _read(file)
    except OSError as error:
        return DiskReading(folder, error=f"{error.strerror or error}: {folder}")


def largest_weights(folder: Path) -> Path | None:
    """Return the largest safetensors file in a folder of models or in a checkpoint."""
    sizes = {}
    for path in folder.rglob("*.safetensors"):
        with suppress(FileNotFoundError):  # removed just now, or a link to what was
            found = path.stat()
            if stat.S_ISREG(found.st_mode) and found.st_size >= _SMALLEST_BYTES:
                sizes[path] = found.st_size
    return max(sizes, key=lambda path: sizes[path], default=None)


def _read(path: Path) -> DiskReading:
    descriptor, uncached = _open(path)
    try:
        size = path.stat().st_size
        # A random offset, so that a second measurement does not read what the first has cached.
        last = max(0, size - _LIMIT_BYTES) // _BLOCK_BYTES
        offset = random.randint(0, last) * _BLOCK_BYTES
        buffer = mmap.mmap(-1, _BLOCK_BYTES)  # page-aligned, as O_DIRECT requires
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
    """Open a file past the cache if possible; returns the descriptor and True if that is sure."""
    if sys.platform == "linux":
        try:
            return open_regular(path, os.O_RDONLY | os.O_DIRECT, follow_links=True), True
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise  # EINVAL: a file system without it, such as tmpfs, or no regular file
            return open_regular(path, follow_links=True), False
    descriptor = open_regular(path, follow_links=True)
    no_cache = getattr(fcntl, "F_NOCACHE", None)
    if no_cache is not None:
        fcntl.fcntl(descriptor, no_cache, 1)
    return descriptor, False
