"""Cases and duration of the measurements of ``k2 bench --calibrate``.

A short and a long prompt, each with an answer, separate the costs that grow with the context from
those that do not. Two concurrent requests show the cost that sequences of a batch share. Prefill is
timed in the same requests as decode, so no case is needed for prompts alone. Each round is one
repetition of all cases, and the number of rounds depends on a time budget.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from k2cli.bench.cases import BenchCase
from k2cli.bench.measure import RepetitionDone
from k2cli.bench.report import BenchRow, Clock, Sample
from k2cli.errors import UsageError

PROBE = BenchCase("tg", 8, 32)
"""First case, whose speed determines the sizes of the others."""
BUDGET_SECONDS = 90.0
"""Time budget of a calibration; exceeded if ``LEAST_ROUNDS`` take longer."""
LEAST_ROUNDS = 3
MOST_OF_EXPECTED, LEAST_LIMIT_SECONDS = 1.5, 60.0
"""Time limit, as a multiple of the expected time, and its minimum."""
SHORT_SECONDS, LONG_SECONDS, ANSWER_SECONDS = 1.5, 6.0, 2.0
LEAST_PROMPT_TOKENS, MOST_PROMPT_TOKENS = 32, 8192
LEAST_ANSWER_TOKENS, MOST_ANSWER_TOKENS = 16, 32


@dataclass(frozen=True, slots=True)
class Schedule:
    """Cases, number of rounds and expected time of one round."""

    cases: tuple[BenchCase, ...]
    rounds: int
    round_seconds: float

    @property
    def expected_seconds(self) -> float:
        """Expected duration, if the machine stays as fast as in the probe."""
        return self.rounds * self.round_seconds

    @property
    def most_seconds(self) -> float:
        """Time limit: no round begins that would end later."""
        return max(LEAST_LIMIT_SECONDS, MOST_OF_EXPECTED * self.expected_seconds)


def calibration_schedule(
    probe: BenchRow, context_length: int | None, concurrency: int, repetitions: int
) -> Schedule:
    """Choose cases and rounds.

    Args:
        probe: the measured ``PROBE``.
        context_length: context length of the server, None if unknown.
        concurrency: number of sequences that the run processes at the same time.
        repetitions: requested number of rounds, reduced if they exceed the time budget.

    Raises:
        UsageError: if the context is too short to calibrate in.
    """
    prefill = PROBE.prompt_tokens / min(probe.first_token)
    decode = max(probe.rates)
    cases = calibration_cases(prefill, decode, context_length, concurrency)
    seconds = sum(
        each.concurrency * (each.prompt_tokens / prefill + each.generated_tokens / decode)
        for each in cases
    )
    affordable = max(LEAST_ROUNDS, int(BUDGET_SECONDS / seconds))
    return Schedule(tuple(cases), min(repetitions, affordable), seconds)


def calibration_cases(
    prefill_tokens_per_second: float,
    decode_tokens_per_second: float,
    context_length: int | None,
    concurrency: int,
) -> list[BenchCase]:
    """Choose the cases by the speeds of the probe.

    Raises:
        UsageError: if the context is too short to calibrate in.
    """
    answer = _bounded(
        decode_tokens_per_second * ANSWER_SECONDS, LEAST_ANSWER_TOKENS, MOST_ANSWER_TOKENS
    )
    room = (context_length or MOST_PROMPT_TOKENS) - MOST_ANSWER_TOKENS - 2
    if room < 2 * LEAST_PROMPT_TOKENS:
        raise UsageError(
            f"a context of {context_length} tokens is too short to calibrate in",
            "k2 stop; k2 launch MODEL --context 1024, with the MODEL that k2 ps shows",
        )
    rate, least = prefill_tokens_per_second, LEAST_PROMPT_TOKENS
    longest = min(room, MOST_PROMPT_TOKENS)
    short = _bounded(rate * SHORT_SECONDS, least, longest // 2)
    long = max(_bounded(rate * LONG_SECONDS, least, longest), 2 * short)
    cases = [BenchCase("tg", answer, short), BenchCase("tg", answer, long)]
    if concurrency > 1:
        cases.append(BenchCase("tg", answer, short, 2))
    return cases


def _bounded(tokens: float, least: int, most: int) -> int:
    return max(least, min(int(tokens), most))


@dataclass(slots=True)
class Rounds:
    """Measurements so far, and the time left for more."""

    schedule: Schedule
    now: Callable[[], float] = time.monotonic
    _samples: dict[BenchCase, list[Sample]] = field(default_factory=dict)
    _clocks: dict[BenchCase, Clock] = field(default_factory=dict)
    _started: float = field(init=False)

    def __post_init__(self) -> None:
        self._started = self.now()

    def add(self, done: RepetitionDone) -> None:
        """Record one repetition."""
        self._samples.setdefault(done.case, []).append(done.sample)
        self._clocks[done.case] = done.clock

    @property
    def complete(self) -> int:
        """Number of rounds in which every case was measured."""
        return min(len(self._samples.get(case, ())) for case in self.schedule.cases)

    @property
    def seconds_left(self) -> float:
        """Expected time until the end of the last round, at the speed so far."""
        measured = sum(map(len, self._samples.values()))
        all_of_them = self.schedule.rounds * len(self.schedule.cases)
        if not measured:
            return self.schedule.expected_seconds
        return (self.now() - self._started) / measured * (all_of_them - measured)

    def enough(self) -> bool:
        """True if another round would exceed the time limit."""
        used = self.now() - self._started
        return used + used / max(self.complete, 1) > self.schedule.most_seconds

    def rows(self) -> Sequence[BenchRow]:
        """Return the measurements of the complete rounds, so that each case has equally many."""
        return [
            BenchRow(case, self._clocks[case], tuple(self._samples[case][: self.complete]))
            for case in self.schedule.cases
            if self.complete
        ]
