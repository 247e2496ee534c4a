"""Rates, medians and ratios computed from the times at which text arrived. Pure functions."""

from __future__ import annotations

import statistics
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer as its client saw it.

    ``marks`` are (seconds since the requests of the measurement were sent, characters or tokens
    received so far), in order. ``content`` is what came, for comparing the two programs.
    """

    prompt_tokens: int
    tokens: int
    marks: tuple[tuple[float, int], ...]
    content: str

    @property
    def first(self) -> float:
        """Seconds to the first text."""
        return self.marks[0][0]

    @property
    def last(self) -> float:
        """Seconds to the last text."""
        return self.marks[-1][0]

    def tokens_until(self, seconds: float) -> float:
        """Return the tokens received by then, by the share of text that had arrived."""
        index = bisect_right(self.marks, seconds, key=lambda mark: mark[0])
        return 0.0 if index == 0 else self.tokens * self.marks[index - 1][1] / self.marks[-1][1]


def decode_rate(answers: Sequence[Answer]) -> float:
    """Return total tokens per second while all requests were being answered."""
    begin = max(answer.first for answer in answers)
    end = min(answer.last for answer in answers)
    if end <= begin:
        return 0.0
    tokens = sum(answer.tokens_until(end) - answer.tokens_until(begin) for answer in answers)
    return tokens / (end - begin)


def whole_rate(answers: Sequence[Answer]) -> float:
    """Tokens per second from sending the requests to the end of the last answer."""
    return sum(answer.tokens for answer in answers) / max(answer.last for answer in answers)


def prefill_rate(answers: Sequence[Answer]) -> float:
    """Prompt tokens per second to the first token of the slowest request."""
    return sum(a.prompt_tokens for a in answers) / max(answer.first for answer in answers)


def first_token_seconds(answers: Sequence[Answer]) -> float:
    """Seconds to the first text of the slowest request."""
    return max(answer.first for answer in answers)


@dataclass(frozen=True, slots=True)
class Summary:
    """Summary of one measure over the rounds."""

    median: float
    low: float
    high: float
    samples: tuple[float, ...]


def summary(samples: Sequence[float]) -> Summary:
    """Median and range."""
    return Summary(statistics.median(samples), min(samples), max(samples), tuple(samples))


def ratios(ours: Sequence[float], theirs: Sequence[float], *, more_is_better: bool) -> Summary:
    """Summarise the ratios of k2 to mlx-lm, round by round; above 1, k2 was better."""
    pairs = zip(ours, theirs, strict=True)
    return summary([a / b if more_is_better else b / a for a, b in pairs])


def order_of_round(number: int) -> tuple[int, int]:
    """Return the order of sides: A B, B A, A B ..., so that a slow drift affects both alike."""
    return (0, 1) if number % 2 == 0 else (1, 0)
