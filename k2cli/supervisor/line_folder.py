"""Fold repeated lines of a log, and bound how many lines one sender may add.

A fault that clients cause is logged as often as they cause it: asyncio writes a hundred equal
tracebacks a second when no file is left. Equal lines and equal tracebacks of one sender become
one, and a count when ten seconds are over. Lines that differ are bounded in number.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

WINDOW_SECONDS = 10.0
LINES_PER_SECOND = 50.0
BURST_LINES = 5_000
_REMEMBERED = 512
_LONGEST_TRACEBACK = 200
_TRACEBACK_WAITS_SECONDS = 1.0
_BEGIN = "Traceback (most recent call last):"

S = TypeVar("S")


@dataclass(slots=True)
class _Seen:
    """A line or a traceback that was written; ``count`` of its repetitions were not."""

    since: float
    count: int = 0


@dataclass(slots=True)
class _Sender:
    """The lines of a traceback that is not complete, and the lines that may still be written."""

    refilled: float
    allowed: float = BURST_LINES
    dropped: int = 0
    traceback: list[str] = field(default_factory=list)
    began: float = 0.0


class LineFolder(Generic[S]):
    """The lines of several senders on their way to a log.

    Args:
        write: receives a sender and each line to write.
        now: the clock, in seconds.
    """

    def __init__(
        self, write: Callable[[S, str], None], now: Callable[[], float] = time.monotonic
    ) -> None:
        self._write = write
        self._now = now
        self._senders: dict[S, _Sender] = {}
        self._seen: OrderedDict[tuple[S, tuple[str, ...]], _Seen] = OrderedDict()

    def add(self, sender: S, line: str) -> None:
        """Write a line, hold it until its traceback is complete, or count it."""
        state = self._senders.setdefault(sender, _Sender(self._now()))
        if line.strip() == _BEGIN:
            self._end_traceback(sender, state)
            state.traceback, state.began = [line], self._now()
        elif state.traceback:
            state.traceback.append(line)
            # The error itself, which is not indented, ends a traceback.
            if not line.startswith((" ", "\t")) or len(state.traceback) > _LONGEST_TRACEBACK:
                self._end_traceback(sender, state)
        else:
            self._add_whole(sender, state, (line,))

    def release(self) -> None:
        """Write the tracebacks that are not complete: what follows must stand after them."""
        for sender, state in list(self._senders.items()):
            self._end_traceback(sender, state)

    def tick(self) -> None:
        """Write the counts whose time is over; to be called about once a second."""
        now = self._now()
        for sender, state in list(self._senders.items()):
            if state.traceback and now - state.began > _TRACEBACK_WAITS_SECONDS:
                self._end_traceback(sender, state)
            self._refill(state)
            if state.dropped and state.allowed >= 1:
                self._tell_dropped(sender, state)
        for key, seen in list(self._seen.items()):
            if now - seen.since >= WINDOW_SECONDS:
                self._end_window(key, seen)

    def close(self) -> None:
        """Write everything that is still held or counted."""
        self.release()
        for key, seen in self._seen.items():
            self._tell_count(key, seen)
        self._seen.clear()
        for sender, state in self._senders.items():
            self._tell_dropped(sender, state)

    # --- one line or traceback ------------------------------------------------------------------

    def _end_traceback(self, sender: S, state: _Sender) -> None:
        if state.traceback:
            lines, state.traceback = tuple(state.traceback), []
            self._add_whole(sender, state, lines)

    def _add_whole(self, sender: S, state: _Sender, lines: tuple[str, ...]) -> None:
        key = (sender, lines)
        seen = self._seen.get(key)
        if seen is not None and self._now() - seen.since >= WINDOW_SECONDS:
            self._end_window(key, seen)
            seen = self._seen.get(key)
        if seen is not None:
            seen.count += 1
            return
        self._refill(state)
        if state.allowed < len(lines):
            state.dropped += len(lines)
            return
        self._tell_dropped(sender, state)
        state.allowed -= len(lines)
        self._remember(key)
        for line in lines:
            self._write(sender, line)

    def _remember(self, key: tuple[S, tuple[str, ...]]) -> None:
        self._seen[key] = _Seen(self._now())
        if len(self._seen) > _REMEMBERED:
            self._tell_count(*self._seen.popitem(last=False))

    def _end_window(self, key: tuple[S, tuple[str, ...]], seen: _Seen) -> None:
        """Write the count, and forget what did not repeat; what did is counted again."""
        if not seen.count:
            del self._seen[key]
            return
        self._tell_count(key, seen)
        seen.since, seen.count = self._now(), 0

    def _tell_count(self, key: tuple[S, tuple[str, ...]], seen: _Seen) -> None:
        if not seen.count:
            return
        sender, lines = key
        times = "once more" if seen.count == 1 else f"{seen.count} times more"
        seconds = f"{max(self._now() - seen.since, 1):.0f} s"
        what = "" if len(lines) == 1 else f"the traceback of {len(lines)} lines "
        self._write(sender, f"[{what}repeated {times} in {seconds}] {lines[-1]}")

    # --- the number of lines --------------------------------------------------------------------

    def _refill(self, state: _Sender) -> None:
        now = self._now()
        more = (now - state.refilled) * LINES_PER_SECOND
        state.allowed, state.refilled = min(state.allowed + more, BURST_LINES), now

    def _tell_dropped(self, sender: S, state: _Sender) -> None:
        if state.dropped:
            count, state.dropped = state.dropped, 0
            state.allowed -= 1
            self._write(
                sender, f"[{count} lines dropped: more than {LINES_PER_SECOND:.0f} lines a second]"
            )
