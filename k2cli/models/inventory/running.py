"""Detection of transfers of a model to this machine that run now, by the locks that they hold."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from k2cli.files import open_regular
from k2cli.models.sources.cache_layout import try_lock

INCOMING_LOCK = ".k2-incoming.lock"
"""Lock of a receiver of weights, in the repository's folder of the cache or the model's own."""


def is_being_received(folder: Path) -> bool:
    """True if another machine is sending to this folder, or its repository in the cache."""
    base = folder.parent.parent if folder.parent.name == "snapshots" else folder
    try:
        descriptor = open_regular(base / INCOMING_LOCK)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(descriptor)
    return False


def download_locks(folder: Path) -> Iterator[Path]:
    """List the locks of all downloads to a folder, of now or of earlier."""
    if folder.parent.name == "snapshots":
        storage = folder.parent.parent
        yield from (storage.parent / ".locks" / storage.name).glob("*.lock")
    else:
        yield from (folder / ".cache" / "huggingface" / "download").rglob("*.lock")


def any_held(locks: Iterable[Path]) -> bool:
    """True if a download holds one of these locks, of which some may not exist."""
    for path in locks:
        if not path.is_file():
            continue
        try:
            lock = try_lock(path)
        except OSError:
            continue  # no lock can be taken there, so no download runs
        if lock is None:
            return True
        lock.close()
    return False
