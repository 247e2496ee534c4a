"""Reuse of host memory while weights are loaded to an NVIDIA GPU.

MLX reads each array into memory from ``malloc``, copies it to the GPU and frees it. glibc takes
each large block from the kernel and gives it back, and the kernel zeroes every page anew: for a
file in memory that takes four times as long as the reading itself (1.6 GB per second of processor
time, 7 without). So while a rank loads, glibc keeps freed memory and uses it again. It then holds
as much as the largest array, which MLX needs in any case, and returns it at the end.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx

# Parameters of mallopt (malloc.h).
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4
_NEVER = -1
_DEFAULT_MMAP_MAX = 65_536
# The highest values to which glibc raises its thresholds itself, until they are set.
_LARGEST_MMAP_THRESHOLD = 32 * 2**20
_LARGEST_TRIM_THRESHOLD = 2 * _LARGEST_MMAP_THRESHOLD


def copies_from_host() -> bool:
    """True if arrays pass through host memory on their way to the device."""
    return sys.platform == "linux" and mx.cuda.is_available() and mx.default_device() == mx.gpu


@contextmanager
def reused_host_memory() -> Iterator[None]:
    """Let this process use freed memory again instead of returning it to the system."""
    libc: Any = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt"):  # not glibc
        yield
        return
    libc.mallopt(_MMAP_MAX, 0)
    libc.mallopt(_TRIM_THRESHOLD, _NEVER)
    try:
        yield
    finally:
        libc.mallopt(_MMAP_MAX, _DEFAULT_MMAP_MAX)
        libc.mallopt(_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD)
        libc.mallopt(_TRIM_THRESHOLD, _LARGEST_TRIM_THRESHOLD)
        libc.malloc_trim(0)
