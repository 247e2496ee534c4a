"""Folders that are written completely or not at all, and a lock."""

from __future__ import annotations

import contextlib
import fcntl
import glob
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from k2cli.errors import K2Error
from k2cli.files import name_with, open_regular, unwritable

_RANDOM = "x" * 8


@contextlib.contextmanager
def folder_being_made(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder beside ``folder``, renamed to it when the block succeeds.

    Raises:
        K2Error: if ``folder`` is not empty, or cannot be written.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise K2Error(f"{folder} already exists", "remove it or name another folder")
    temporary: Path | None = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=_temporary_prefix(folder), dir=folder.parent))
        temporary.chmod(0o755)
        with _held(temporary):
            yield temporary
            os.replace(temporary, folder)
    except OSError as error:
        raise unwritable(error, folder) from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def _held(folder: Path) -> Iterator[bool]:
    """Hold the lock of a temporary folder; the value is False if another process has it.

    A volume without locks gives none, and then nobody can see that the folder is in use.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        except OSError:
            pass
        yield True
    finally:
        os.close(descriptor)


def remove_made_folder(folder: Path) -> bool:
    """Remove a temporary folder that a killed process left; False if one is still writing to it.

    Raises:
        OSError: if it cannot be removed.
    """
    with _held(folder) as alone:
        if alone:
            shutil.rmtree(folder)
    return alone


def is_being_made(folder: Path) -> bool:
    """True if a process is writing to a temporary folder.

    Raises:
        OSError: if it cannot be opened.
    """
    with _held(folder) as alone:
        return not alone


def remove_leftovers(folder: Path, *, older_than_seconds: float = 0.0) -> None:
    """Remove temporary folders that a killed process left behind.

    Call it with the lock held, or for old folders alone: a new one has no lock for a moment.
    """
    latest = time.time() - older_than_seconds
    for left in folder.parent.glob(glob.escape(_temporary_prefix(folder)) + "*"):
        with contextlib.suppress(OSError):
            if left.stat(follow_symlinks=False).st_mtime <= latest:
                remove_made_folder(left)


def _temporary_prefix(folder: Path) -> str:
    # mkdtemp adds eight letters to it
    return name_with(f".{folder.name}", ".k2-" + _RANDOM).removesuffix(_RANDOM)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on ``path``, so that two processes do not fetch the same model.

    Raises:
        K2Error: if the lock file cannot be created.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        stream = os.fdopen(open_regular(path, os.O_WRONLY | os.O_CREAT), "w")
    except OSError as error:
        raise unwritable(error, path) from error
    with stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield  # closing the file releases the lock
