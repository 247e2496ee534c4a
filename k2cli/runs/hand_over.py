"""The moments in which it is decided whose a run is: its launcher's, its supervisor's, or nobody's.

A command that finds the launcher dead records that the run is lost, and one that stops it that it
is stopped. The supervisor that the launcher has started may be about to take the run over then:
either it comes first and the run is its own, or it finds that the run is over.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from k2cli.pauses import Deadline

_POLL_SECONDS = 0.02
_MOST_SECONDS = 5.0


@contextmanager
def deciding(folder: Path) -> Iterator[None]:
    """Hold the lock of a run's folder while its record is read and written.

    Others hold it for moments only. The body runs without it if there is no folder, if the file
    system has no locks, or if a process that was stopped keeps it.
    """
    descriptor = _locked(folder)
    try:
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)


def _locked(folder: Path) -> int | None:
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return None
    limit = Deadline(_MOST_SECONDS)
    while not limit.has_passed:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(_POLL_SECONDS)
        except OSError:
            break
        else:
            return descriptor
    os.close(descriptor)
    return None
