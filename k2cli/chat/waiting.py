"""Description of what a server is doing for a request, from the events that it sends."""

from __future__ import annotations

import time
from collections.abc import Callable

from k2cli.client.answers import CallDelta, Delta, Progress, ReasoningDelta, StreamEvent
from k2cli.units import format_duration

_LEAST_SECONDS = 0.5
"""Time after which a rate is shown."""


class Waiting:
    """State of a request that is being answered; ``status`` describes it in one line.

    Args:
        clock: returns seconds that never go back.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._sent_at = clock()
        self._queue_position: int | None = None
        self._prefill: list[tuple[float, int]] = []
        self._prefill_total = 0
        self._cached_tokens = 0
        self._counted_tokens: int | None = None
        self._pieces = 0
        self._first: tuple[float, int] | None = None
        self._reasoned: tuple[float, int] | None = None
        self._answering = False
        self._called = ""

    def update(self, event: StreamEvent) -> None:
        """Take note of an event of the stream."""
        now = self._clock()
        if isinstance(event, Progress):
            self._note_progress(event, now)
        elif isinstance(event, Delta | ReasoningDelta | CallDelta):
            self._pieces += 1
            self._first = self._first or (now, self.tokens)
            if isinstance(event, ReasoningDelta):
                self._reasoned = now, self.tokens
            elif isinstance(event, CallDelta):
                self._called = event.name or self._called
            else:
                self._answering = True

    def _note_progress(self, event: Progress, now: float) -> None:
        self._queue_position = event.queue_position
        if event.prefill_done is not None:
            # The first and the newest are enough for the speed.
            self._prefill = [*self._prefill[:1], (now, event.prefill_done)]
            self._prefill_total = event.prefill_total or 0
            self._cached_tokens = event.cached_tokens or 0
        if event.completion_tokens is not None:
            self._counted_tokens = event.completion_tokens
            self._first = self._first or (now, event.completion_tokens)

    @property
    def tokens(self) -> int:
        """Tokens generated so far; of other servers than k2, the pieces that have arrived."""
        return self._pieces if self._counted_tokens is None else self._counted_tokens

    def status(self) -> str:
        """Describe the state of the request now."""
        now = self._clock()
        waited = _seconds(now - self._sent_at)
        if self._first is not None:
            what = "answering" if self._answering else "thinking"
            what = f"calling {self._called}" if self._called else what
            parts = [what, waited, _tokens(self.tokens)]
            began, first_tokens = self._first
            if now - began >= _LEAST_SECONDS:
                parts.append(f"{(self.tokens - first_tokens) / (now - began):.1f} tokens/s")
            return " · ".join(parts)
        if self._queue_position is not None:
            return f"waiting, position {self._queue_position} in the queue · {waited}"
        if self._prefill_total:
            return self._prefill_text(self._time_left(now) or waited)
        return f"waiting for the server · {waited}"

    def thought(self) -> str:
        """Describe the reasoning once it is over; "" if there was none."""
        if self._reasoned is None or self._first is None:
            return ""
        until, tokens = self._reasoned
        return f"thought for {_seconds(until - self._first[0])}, {_tokens(tokens)}"

    def _prefill_text(self, time_left: str) -> str:
        """Describe the reading of the prompt; a narrow terminal shows the beginning alone."""
        counts = f"{self._prefill[-1][1]:,} of {self._prefill_total:,} tokens"
        reused = f" · {self._cached_tokens:,} from the cache" if self._cached_tokens else ""
        return f"reading the prompt · {time_left} · {counts}{reused}"

    def _time_left(self, now: float) -> str:
        """Return the time until the prompt is read, by the speed so far; "" if it is not known."""
        (began, before), (newest, done) = self._prefill[0], self._prefill[-1]
        if done <= before or newest <= began:
            return ""
        left = (self._prefill_total - done) * (newest - began) / (done - before)
        left -= now - newest
        return f"{_seconds(left)} left" if left >= 1 else "soon done"


def _seconds(seconds: float) -> str:
    """Format a time in whole seconds, so that a line does not change with every event."""
    return format_duration(seconds) if seconds >= 60 else f"{max(0, int(seconds))} s"


def _tokens(count: int) -> str:
    return f"{count:,} token" + ("" if count == 1 else "s")
