"""Locks of pushes that read a model: it is not removed meanwhile.

Each folder that is read has a lock file in k2's own data folder, since the model's folder may be on
a read-only disk. Readers share it; a removal needs it alone. It ends with its process, however that
ends.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from k2cli.errors import K2Error
from k2cli.files import open_regular
from k2cli.models.inventory.known_folders import folder_key
from k2cli.models.inventory.writers import is_held
from k2cli.settings import data_directory

WAIT = "wait until it has ended, or end it"


def _lock_path(folder: Path) -> Path:
    return data_directory() / "reading" / f"{folder_key(folder)}.lock"


def is_being_read(folder: Path) -> bool:
    """True if a push of this user reads a model's folder now."""
    return is_held(_lock_path(folder))


@contextmanager
def reading(folder: Path) -> Iterator[None]:
    """Keep a model's folder from being removed while the block runs.

    Without a place for the lock, such as on a disk that is full, the block runs all the same.

    Raises:
        K2Error: if the model is being removed.
    """
    yield from _locked(folder, fcntl.LOCK_SH, f"{folder} is being removed", "k2 models list")


@contextmanager
def not_read(folder: Path, name: str) -> Iterator[None]:
    """Let no push begin to read a model's folder while the block runs.

    Args:
        folder: the model's folder.
        name: the model, for the message.

    Raises:
        K2Error: if a push reads it.
    """
    yield from _locked(folder, fcntl.LOCK_EX, f"'{name}' is being sent by a running push", WAIT)


def _locked(folder: Path, kind: int, problem: str, hint: str) -> Iterator[None]:
    path = _lock_path(folder)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = open_regular(path, os.O_RDWR | os.O_CREAT)
    except OSError:
        yield
        return
    try:
        try:
            fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
        except OSError:
            raise K2Error(problem, hint) from None
        yield
    finally:
        os.close(descriptor)
