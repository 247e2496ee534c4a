"""Counts of all requests since the server began, as plain numbers.

They are kept without prometheus_client, which is imported only when somebody asks for metrics.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter, deque
from dataclasses import dataclass, field
from typing import Literal, get_args

Dialect = Literal[
    "chat", "completions", "responses", "messages", "count_tokens", "tokenize", "other"
]
"""The form of a request, by its route. ``other``: a request that was refused on any other route."""

GENERATING: tuple[Dialect, ...] = ("chat", "completions", "responses", "messages")
"""The dialects whose requests generate an answer."""

Result = Literal["completed", "client_gone", "invalid", "unauthorized", "refused", "failed"]
"""The end of a request.

``client_gone``: the client closed the connection first. ``invalid``: it asked for what is wrong or
not possible (4xx). ``unauthorized``: no right key, host or origin (401, 403). ``refused``: the
server has too much to do, or no run is ready (429, 503, 529). ``failed``: the run ended, or has a
fault.
"""

RESULTS: tuple[Result, ...] = get_args(Result)

FINISH_REASONS = ("stop", "length", "tool_calls")
"""Ends of a complete answer, as in ``server.generation.FinishReason``."""

LATENCY_BUCKETS = (
    0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0,
)  # fmt: skip
"""Bounds in seconds for waiting, the first token and whole requests: long prompts take minutes."""

TOKEN_BUCKETS = (
    0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5, 10.0,
)  # fmt: skip
"""Bounds in seconds for the time between two tokens: 400 tokens a second to a stall."""

MAX_KEYS = 64
"""Names of keys that are counted apart; the requests of further ones are counted together."""

OTHER_KEYS = "other"

RATE_SECONDS = 5
"""The time over which a rate is taken."""


@dataclass(slots=True)
class Histogram:
    """Observed values by ranges. ``counts`` has one number per bound, and one for larger values."""

    bounds: tuple[float, ...]
    counts: list[int] = field(init=False)
    sum: float = 0.0

    def __post_init__(self) -> None:
        self.counts = [0] * (len(self.bounds) + 1)

    def observe(self, value: float, times: int = 1) -> None:
        """Count a value, which belongs to the first bound that is not below it."""
        self.counts[bisect_left(self.bounds, value)] += times
        self.sum += value * times

    @property
    def count(self) -> int:
        """The number of observed values."""
        return sum(self.counts)


@dataclass(slots=True)
class KeyTotals:
    """Totals of the requests with one key; of all requests, if the run has no named keys."""

    requests: Counter[tuple[Dialect, Result]] = field(default_factory=Counter)
    answers: Counter[tuple[Dialect, str]] = field(default_factory=Counter)
    prompt_tokens: Counter[Dialect] = field(default_factory=Counter)
    cached_tokens: Counter[Dialect] = field(default_factory=Counter)
    cache_hits: Counter[Dialect] = field(default_factory=Counter)
    completion_tokens: Counter[Dialect] = field(default_factory=Counter)
    reasoning_tokens: Counter[Dialect] = field(default_factory=Counter)
    draft_tokens: Counter[Dialect] = field(default_factory=Counter)
    accepted_tokens: Counter[Dialect] = field(default_factory=Counter)
    queue_seconds: Histogram = field(default_factory=lambda: Histogram(LATENCY_BUCKETS))
    first_token_seconds: Histogram = field(default_factory=lambda: Histogram(LATENCY_BUCKETS))
    inter_token_seconds: Histogram = field(default_factory=lambda: Histogram(TOKEN_BUCKETS))
    pauses: int = 0
    request_seconds: Histogram = field(default_factory=lambda: Histogram(LATENCY_BUCKETS))


class Rate:
    """Events per second, over the last ``RATE_SECONDS``."""

    def __init__(self) -> None:
        self._counts: deque[tuple[int, int]] = deque()

    def add(self, count: int, now: float) -> None:
        """Count events that happen now, by a clock in seconds."""
        second = int(now)
        if self._counts and self._counts[-1][0] == second:
            count += self._counts.pop()[1]
        self._counts.append((second, count))
        self._forget(second)

    def per_second(self, now: float) -> float:
        """Return the events per second of the time before now."""
        second = int(now)
        self._forget(second)
        # The whole seconds that are kept, and the part of the present one.
        seconds = RATE_SECONDS + now - second
        return sum(count for _, count in self._counts) / seconds

    def _forget(self, second: int) -> None:
        while self._counts and self._counts[0][0] < second - RATE_SECONDS:
            self._counts.popleft()


@dataclass(slots=True)
class Totals:
    """Totals of all requests by the name of their key, and the present rates of tokens.

    The empty name is that of a run without named keys. ``prompt_rate`` counts computed tokens,
    not those of the cache.
    """

    by_key: dict[str, KeyTotals] = field(default_factory=lambda: {"": KeyTotals()})
    completion_rate: Rate = field(default_factory=Rate)
    prompt_rate: Rate = field(default_factory=Rate)

    def of_key(self, name: str) -> KeyTotals:
        """Return the totals of a key; further names than ``MAX_KEYS`` share one entry."""
        return self.by_key.setdefault(self.counted_as(name), KeyTotals())

    def counted_as(self, name: str) -> str:
        """Return the name under which a key is counted."""
        return name if name in self.by_key or len(self.by_key) < MAX_KEYS else OTHER_KEYS
