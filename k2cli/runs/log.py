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

from k2cli.units import MIB, clean_text

MAX_LOG_BYTES = 64 * MIB
_POLL_SECONDS = 0.2


@dataclass(frozen=True, slots=True)
class LogEntry:
    """One line. ``time`` is seconds since the epoch; ``rank`` may be ``mpirun`` or ``-``."""

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
    if not path.is_file():
        return
    with path.open(encoding="utf-8", errors="replace") as file:
        lines = file if count is None else deque(file, maxlen=max(count, 0))
        for line in lines:
            yield line.rstrip("\n")


def follow(path: Path, count: int | None, over: Callable[[], bool]) -> Iterator[str]:
    """Yield the last lines, then every new one until ``over`` returns True.

    If the log is rotated meanwhile, continue with its new file.
    """
    while not path.is_file():
        if over():
            return
        time.sleep(_POLL_SECONDS)
    file = path.open(encoding="utf-8", errors="replace")
    try:
        for line in deque(file, maxlen=count) if count is not None else file:
            yield line.rstrip("\n")
        partial = ""
        while True:
            ended = over()
            while chunk := file.readline():
                partial += chunk
                if partial.endswith("\n"):
                    yield partial.rstrip("\n")
                    partial = ""
            if ended:
                return
            if path.exists() and path.stat().st_ino != os.fstat(file.fileno()).st_ino:
                file.close()
                file = path.open(encoding="utf-8", errors="replace")
                continue
            time.sleep(_POLL_SECONDS)
    finally:
        file.close()
