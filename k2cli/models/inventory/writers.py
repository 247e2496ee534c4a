"""Detection of downloads and pushes that write to a model's folder, by the locks that they hold.

The Hub library and k2 lock each content in ``.locks/REPOSITORY/HASH.lock`` while they fetch it, and
a receiver of a push locks ``.k2-incoming.lock`` in the folder that it writes to.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from k2cli.errors import K2Error
from k2cli.files import is_same_file, open_regular
from k2cli.models.inventory.hub_cache import INCOMING_LOCK, CachedRepository

Writer = Literal["", "download", "push"]


def writer_of_repository(repository: CachedRepository) -> Writer:
    """Return what is writing to a repository in the Hub library's cache now; "" for nothing."""
    return _writer(repository.lock_folder, repository.folder)


def writer_of_folder(folder: Path) -> Writer:
    """Return what is writing to a model's folder outside that cache now; "" for nothing."""
    return _writer(folder / ".cache" / "huggingface" / "download", folder)


def _writer(locks: Path, folder: Path) -> Writer:
    if any(is_held(path) for path in (locks.rglob("*.lock") if locks.is_dir() else ())):
        return "download"
    return "push" if is_held(folder / INCOMING_LOCK) else ""


def download_locks(folder: Path) -> Iterator[Path]:
    """List the locks of all downloads to a folder, of now or of earlier."""
    if folder.parent.name == "snapshots":
        storage = folder.parent.parent
        yield from (storage.parent / ".locks" / storage.name).glob("*.lock")
    else:
        yield from (folder / ".cache" / "huggingface" / "download").rglob("*.lock")


def receiving_lock(folder: Path) -> Path:
    """Return the lock of a receiver that writes to this folder, or its repository in the cache."""
    base = folder.parent.parent if folder.parent.name == "snapshots" else folder
    return base / INCOMING_LOCK


def refuse_writer(writer: Writer, name: str) -> None:
    """Refuse to change a model that is being written.

    Raises:
        K2Error: if there is a writer.
    """
    if writer:
        raise K2Error(
            f"'{name}' is being written by a running {writer}", "wait for its end, or end it"
        )


def is_held(path: Path) -> bool:
    """True if a process holds the lock of a file; also if this cannot be found out."""
    try:
        descriptor = _open_lock(path)
    except PermissionError:
        return True  # of another user, who may be writing
    except OSError:
        return False  # there is none, or it is no lock file
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(descriptor)
    return False


def _open_lock(path: Path) -> int:
    """Open a lock file; one that may only be read can be locked too, but not on every volume."""
    try:
        return open_regular(path, os.O_RDWR)
    except PermissionError:
        return open_regular(path)


@contextmanager
def held(path: Path, name: str) -> Iterator[None]:
    """Hold the lock of a file, which is made if need be, so that no writer begins.

    Args:
        path: the lock file.
        name: the model, for the message.

    Raises:
        K2Error: if a process holds it.
        OSError: if it cannot be made.
    """
    writer: Writer = "push" if path.name == INCOMING_LOCK else "download"
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = open_regular(path, os.O_RDWR | os.O_CREAT)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            refuse_writer(writer, name)
        if not is_same_file(descriptor, path):  # its holder has removed it, and another may hold it
            refuse_writer(writer, name)
        yield
    finally:
        os.close(descriptor)
