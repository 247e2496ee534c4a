"""The time since a run's lock was renewed, by a clock that nobody sets.

The wall clock may be set while a run lives, by NTP or with a virtual machine, and a live run's lock
would look old. So beside each lock lies a file whose modification time is that of the monotonic
clock, which all processes of a machine share, and whose content names the present boot, since that
clock begins again with each one. To renew it takes no space on a disk that may be full.
"""

from __future__ import annotations

import functools
import math
import os
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

from k2cli.files import matching, read_regular, write_atomically

_SUFFIX = ".renewed"
_LIMIT_BYTES = 256
_SYSCTL_SECONDS = 5.0


@functools.cache
def boot_id() -> str:
    """Return a text that names the present boot; empty if the system does not tell."""
    with suppress(OSError, subprocess.SubprocessError):
        if sys.platform == "linux":
            return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        command = ["/usr/sbin/sysctl", "-n", "kern.bootsessionuuid"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SYSCTL_SECONDS)
        return done.stdout.strip()
    return ""


def begin(lock: Path) -> None:
    """Mark a lock that was just written as renewed now.

    Raises:
        OSError: if the file beside it cannot be written.
    """
    write_atomically(_beside(lock), boot_id(), 0o644)
    renew(lock)


def renew(lock: Path) -> None:
    """Mark a lock as renewed now.

    Raises:
        OSError: if there is no such lock, or it is another user's.
    """
    os.utime(lock, follow_symlinks=False)  # what earlier versions of k2 look at
    now = time.monotonic_ns()
    os.utime(_beside(lock), ns=(now, now), follow_symlinks=False)


def age_seconds(lock: Path) -> float | None:
    """Return the seconds since a lock was renewed; infinite if that was before the last boot.

    Returns:
        None if the lock has no mark of its owner: it is that of an earlier version of k2.
    """
    path = _beside(lock)
    with suppress(OSError, UnicodeDecodeError):
        found = path.lstat()
        if found.st_uid == lock.lstat().st_uid:
            age = time.monotonic() - found.st_mtime
            of_this_boot = read_regular(path, _LIMIT_BYTES).decode() == boot_id()
            # Within a boot the clock does not go back; file systems may round times up.
            return max(age, 0.0) if of_this_boot and age > -2.0 else math.inf
    return None


def remove(lock: Path) -> None:
    """Remove the mark of a lock."""
    with suppress(OSError):  # another user's, which the folder's mode protects
        _beside(lock).unlink(missing_ok=True)


def remove_lonely(folder: Path) -> None:
    """Remove this user's marks whose locks are gone: earlier versions of k2 leave them."""
    for path in matching(folder, f"*{_SUFFIX}"):
        lock = path.with_suffix(".json")
        if not lock.exists():
            remove(lock)


def _beside(lock: Path) -> Path:
    return lock.with_suffix(_SUFFIX)
