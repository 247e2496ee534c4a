"""Facts about other processes, some of which end meanwhile or belong to other users.

psutil's own errors say so. But on macOS version 7.2.1 raises ``OSError`` for the command line of a
process that is ending, and 7.2.2 ``SystemError`` (giampaolo/psutil#2708, #2854). A process that k2
has nothing to do with must not make ``k2 ps`` or ``k2 stop`` fail.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import psutil


def command_of(process: psutil.Process) -> list[str]:
    """Return the command line of a process; empty if it has ended or cannot be looked at."""
    import psutil  # slow to import

    try:
        return process.cmdline()
    except (psutil.Error, OSError, SystemError):
        return []


def variable_of(process: psutil.Process, name: str) -> str | None:
    """Return a variable of the environment of a process; None also if that cannot be read."""
    import psutil

    try:
        return process.environ().get(name)
    except (psutil.Error, OSError, SystemError):
        return None


def name_of(process: psutil.Process) -> str:
    """Return the name of a process; empty if it has ended.

    macOS keeps 16 characters of it. psutil completes it from the command line, if that can be read.
    """
    import psutil

    try:
        return process.name()
    except (psutil.Error, OSError, SystemError):
        return ""
