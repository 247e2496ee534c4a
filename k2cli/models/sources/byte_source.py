"""Interface of the places that bytes of a model come from, and the one for folders.

The Hub, a mirror and ModelScope are HTTP sources; a folder may be a mounted disk or the cache of
the Hub library; another node is a source of its own.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from k2cli.errors import K2Error
from k2cli.files import open_regular
from k2cli.models.sources.expected_files import ExpectedFile

_READ_BYTES = 2**18


class PassingError(Exception):
    """A failure that another attempt may not have: a cut connection, a server under load.

    ``wait_seconds`` is set if the server said how long to wait.
    """

    def __init__(self, reason: str, wait_seconds: float | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.wait_seconds = wait_seconds


@dataclass(frozen=True, slots=True)
class Answer:
    """Bytes of a file from ``first`` on; ``chunks`` may have fewer than were asked for.

    ``ranged`` is False if the source sends the file to its end, since it knows no ranges.
    """

    first: int
    chunks: Iterator[bytes]
    ranged: bool = True


class ByteSource(Protocol):
    """A place that bytes of files come from; several threads use it at once."""

    def open(
        self, file: ExpectedFile, first: int, past_last: int
    ) -> contextlib.AbstractContextManager[Answer]:
        """Ask for a range of a file.

        Raises:
            PassingError: on entering or while reading, if another attempt may succeed.
            K2Error: if none will.
        """

    def close(self) -> None:
        """Close all connections; reads that wait may fail."""


class FolderSource:
    """Files of a folder on this machine, such as a mounted disk."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @contextlib.contextmanager
    def open(self, file: ExpectedFile, first: int, past_last: int) -> Iterator[Answer]:
        """Read a range; see ``ByteSource``."""
        path = self._folder / file.name
        try:
            descriptor = open_regular(path, follow_links=True)
        except OSError as error:
            raise _unreadable(path, error) from error
        try:
            yield Answer(first, _chunks(descriptor, path, first, past_last))
        finally:
            os.close(descriptor)

    def close(self) -> None:
        """Do nothing: files are open only while they are read."""


def _unreadable(path: Path, error: OSError) -> K2Error:
    return K2Error(
        f"cannot read {path}: {error.strerror}", "check that the disk is mounted and sound"
    )


def _chunks(descriptor: int, path: Path, first: int, past_last: int) -> Iterator[bytes]:
    while first < past_last:
        try:
            data = os.pread(descriptor, min(_READ_BYTES, past_last - first), first)
        except OSError as error:
            raise _unreadable(path, error) from error
        if not data:
            raise K2Error(f"{path} has become shorter: it ends at byte {first}", "copy it again")
        yield data
        first += len(data)
