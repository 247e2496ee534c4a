"""Clocks and time limits that do not count the time in which this process itself did not run.

A process may be stopped and continued: by a signal, by a debugger, with its virtual machine.
Meanwhile it hears nothing from anybody, and must not take that for the silence of the others. So
whoever waits reads a clock at short intervals. A reading that comes much later than the interval
shows a pause, and the clock goes on as if only one interval had passed. A peer that alone is
stopped is still found silent after the same time.

``event_loop`` gives asyncio such a clock, so that all of its timeouts discount pauses.
"""

from __future__ import annotations

import time
from collections.abc import Callable

INTERVAL_SECONDS = 0.25
"""The longest wait between two readings of a clock, and what a pause counts."""

LATE_SECONDS = 1.0
"""A reading that comes later than this after the one before it follows a pause."""


class PauseAwareClock:
    """A monotonic clock that stands still in pauses. Read it every ``INTERVAL_SECONDS``.

    Args:
        read_seconds: the clock of the system.
    """

    def __init__(self, read_seconds: Callable[[], float] = time.monotonic) -> None:
        self._read_seconds = read_seconds
        self._last = read_seconds()
        self.paused_seconds = 0.0
        """The time that the clock has left out so far."""

    def now(self) -> float:
        """Return the seconds of this clock."""
        real = self._read_seconds()
        gap = real - self._last
        self._last = real
        if gap > LATE_SECONDS:
            self.paused_seconds += gap - INTERVAL_SECONDS
        return real - self.paused_seconds


class Deadline:
    """A time limit of code that blocks, without pauses. Ask it every ``INTERVAL_SECONDS``.

    Args:
        seconds: the limit, from now on.
        clock: the clock to use; None for a new one.
    """

    def __init__(self, seconds: float, clock: PauseAwareClock | None = None) -> None:
        self.seconds = seconds
        """The whole limit, for messages."""
        self._clock = clock or PauseAwareClock()
        self._until = self._clock.now() + seconds

    @property
    def left_seconds(self) -> float:
        """The time that is left, 0 if the limit has passed."""
        return max(self._until - self._clock.now(), 0.0)

    @property
    def has_passed(self) -> bool:
        """True once the limit has passed."""
        return self.left_seconds <= 0

    def next_wait(self, most_seconds: float = INTERVAL_SECONDS) -> float:
        """Return the seconds to wait before asking again, at most ``most_seconds``."""
        return min(self.left_seconds, most_seconds)
