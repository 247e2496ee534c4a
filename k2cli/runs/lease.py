"""The lease of a run that is for chats, or for one check: it ends once nobody holds the lease.

Each chat, or the check, holds a shared lock of a file in the run's folder. The kernel releases it
when that process ends, however it ends. The supervisor tries to get the lock alone, and keeps it
once it has it, so that no chat can join a run that is ending.
"""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from k2cli.files import open_regular

LEASE_NAME = "chats.lock"


class Lease:
    """A lock of a run's lease file, shared or not; ``close`` releases it."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def close(self) -> None:
        """Release the lease. A second call does nothing."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def hold(folder: Path) -> Lease | None:
    """Take a share of the lease of the run in a folder; None if the run is ending.

    Raises:
        OSError: if the file cannot be made.
    """
    return _lock(folder, fcntl.LOCK_SH)


def take_over(folder: Path) -> Lease | None:
    """Take the lease if no chat holds a share of it; None otherwise.

    Raises:
        OSError: if the file cannot be made.
    """
    return _lock(folder, fcntl.LOCK_EX)


def _lock(folder: Path, kind: int) -> Lease | None:
    descriptor = open_regular(folder / LEASE_NAME, os.O_RDWR | os.O_CREAT, mode=0o600)
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    except BaseException:
        os.close(descriptor)
        raise
    return Lease(descriptor)
