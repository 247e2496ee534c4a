"""The merged log of a run: one line for each line that a rank, a guard or mpirun wrote.

Its format is ``2026-01-31T12:00:00.123+01:00 NODE RANK | TEXT``.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TextIO

from k2cli.errors import K2Error
from k2cli.files import open_regular
from k2cli.units import MIB, clean_text

MAX_LOG_BYTES = 64 * MIB
ACCESS_SENDER = "api"
"""The sender of lines about finished requests, in place of a rank."""
_POLL_SECONDS = 0.2
_MAX_LINE_CHARACTERS = 2**20


@dataclass(frozen=True, slots=True)
class LogEntry:
    """One line. ``time`` is of the epoch; ``rank`` may be ``mpirun``, ``api`` or ``-``."""

    time: float
    node: str
    rank: str
    text: str


def format_entry(entry: LogEntry) -> str:
    """Return the entry as a line of the file."""
    when = datetime.fromtimestamp(entry.time).astimezone().isoformat(timespec="milliseconds")
    return clean_text(f"{when} {entry.node} {entry.rank} | {entry.text}", keep="\t")


def parse_entry(line: str) -> LogEntry:
    """Read a line of ``format_entry``; any other line becomes the text of an unknown sender."""
    head, bar, text = line.partition(" | ")
    fields = head.split(" ")
    if bar and len(fields) == 3:
        with contextlib.suppress(ValueError):
            when = datetime.fromisoformat(fields[0]).timestamp()
            return LogEntry(when, fields[1], fields[2], text)
    return LogEntry(0.0, "-", "-", line)


def last_lines(path: Path, count: int | None) -> Iterator[str]:
    """The last ``count`` lines of a log, or all of them; none if there is no log yet."""
    try:
        file = _opened(path)
    except FileNotFoundError:
        return
    with file:
        whole = _whole_lines(file)
        yield from whole if count is None else deque(whole, maxlen=max(count, 0))


def follow(path: Path, count: int | None, over: Callable[[], bool]) -> Iterator[str]:
    """Yield the last lines, then every new one until ``over`` returns True.

    If the log is rotated meanwhile, continue with its new file.
    """
    while (file := _opened_if_there(path)) is None:
        if over():
            return
        time.sleep(_POLL_SECONDS)
    try:
        whole = _whole_lines(file)
        yield from deque(whole, maxlen=count) if count is not None else whole
        partial = ""
        while True:
            ended = over()
            # Looked at before the rest is read: once there is a new file, nothing is added to this.
            newer = None if _is_at(path, file) else _opened_if_there(path)
            while chunk := file.readline(_MAX_LINE_CHARACTERS):
                partial += chunk
                if partial.endswith("\n") or len(partial) >= _MAX_LINE_CHARACTERS:
                    yield partial.rstrip("\n")
                    partial = ""
            if newer is not None:
                file.close()
                file = newer
                continue
            if ended:
                return
            time.sleep(_POLL_SECONDS)
    finally:
        file.close()


def _is_at(path: Path, file: TextIO) -> bool:
    """True if a path still leads to an open log, or for a moment to none: it is being rotated."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(file.fileno()))
    except FileNotFoundError:
        return True


def _opened_if_there(path: Path) -> TextIO | None:
    try:
        return _opened(path)
    except FileNotFoundError:
        return None


def _opened(path: Path) -> TextIO:
    """Open a log.

    Raises:
        FileNotFoundError: if there is none.
        K2Error: if it cannot be read, or is not a regular file.
    """
    try:
        return os.fdopen(open_regular(path), encoding="utf-8", errors="replace")
    except FileNotFoundError:
        raise
    except OSError as error:
        raise K2Error(f"the log {path} cannot be read: {error.strerror}") from error


def _whole_lines(file: TextIO) -> Iterator[str]:
    """Yield the lines of a file. One that is too long to be of k2 comes in pieces."""
    while line := file.readline(_MAX_LINE_CHARACTERS):
        yield line.rstrip("\n")
