"""Processes that the servers of a chat have started: found below a process, or by a mark.

The mark is a variable of their environment, which what they start inherits, also in a session of
its own and after its parent has ended.
"""

from __future__ import annotations

import contextlib
import os

import psutil

from k2cli.system.processes import variable_of

MARK = "MCP_HOST_MARK"
_ROUNDS = 10


def descendants(pid: int) -> list[psutil.Process]:
    """Return the processes that a process started, directly or not, and that still live."""
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.Error:
        return []


def kill_descendants() -> None:
    """Kill everything that this process started; on Linux it adopts what its children left."""
    for _ in range(_ROUNDS):
        if not _killed(descendants(os.getpid())):
            return


def kill_marked(mark: str) -> None:
    """Kill every process of this user that has a mark.

    On macOS, the environment of programs that belong to the system cannot be read; these stay.
    """
    for _ in range(_ROUNDS):
        if not _killed([each for each in psutil.process_iter() if _has(each, mark)]):
            return


def _has(process: psutil.Process, mark: str) -> bool:
    try:
        return process.uids().real == os.getuid() and variable_of(process, MARK) == mark
    except psutil.Error:
        return False


def _killed(found: list[psutil.Process]) -> bool:
    """Kill processes and wait for their end; False if there are none."""
    for each in found:
        with contextlib.suppress(psutil.Error):
            each.kill()
    psutil.wait_procs(found, timeout=1)
    return bool(found)
