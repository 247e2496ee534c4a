"""What a child process of k2 does when it begins: end with its parent, and limit its memory."""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import signal
import sys
from collections.abc import Callable

_PR_SET_PDEATHSIG = 1


def end_with_parent() -> None:
    """Ask the Linux kernel to kill this process when its parent ends, whatever it is doing.

    Elsewhere it does nothing: a child notices the end of its parent by their connection.
    """
    if sys.platform == "linux":
        ending_with(os.getppid())()


def ending_with(parent: int) -> Callable[[], None]:
    """Return a function that ties this process to its parent; it allocates and locks nothing.

    Linux only. It may be called between fork and exec.
    """
    prctl = ctypes.CDLL(None, use_errno=True).prctl

    def tie() -> None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:
            os._exit(1)

    return tie


def limit_memory(memory_bytes: int) -> None:
    """Limit this process's memory, which is beside a model that needs the rest of the machine.

    macOS does not enforce the limit.
    """
    with contextlib.suppress(OSError, ValueError):
        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        resource.setrlimit(resource.RLIMIT_DATA, (memory_bytes, hard))
