"""What ``k2 bench --calibrate`` measures, and how long it takes for it.

A short and a long prompt, each with an answer, tell compute from attention and reading from what
grows with the context; two requests at a time tell what rows share. A prompt is timed where its
answer follows, so that no case is measured for prompts alone. Cases take turns: each round is one
repetition of all of them, and there are as many rounds as a budget of time allows.
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
"""The first case: how fast prompts and answers are, so that the others can be sized."""
BUDGET_SECONDS = 90.0
"""What a calibration may take, if so many rounds as tell noise from speed fit in."""
LEAST_ROUNDS = 3
MOST_OF_EXPECTED, LEAST_LIMIT_SECONDS = 1.5, 60.0
"""A machine that is busier than while it was probed may take so much longer than expected."""
SHORT_SECONDS, LONG_SECONDS, ANSWER_SECONDS = 1.5, 6.0, 2.0
LEAST_PROMPT_TOKENS, MOST_PROMPT_TOKENS = 32, 8192
LEAST_ANSWER_TOKENS, MOST_ANSWER_TOKENS = 16, 32


@dataclass(frozen=True, slots=True)
class Schedule:
    """What will be measured, and how long that takes: said before it starts."""

    cases: tuple[BenchCase, ...]
    rounds: int
    round_seconds: float

    @property
    def expected_seconds(self) -> float:
        """If the machine stays as fast as it was when it was probed."""
        return self.rounds * self.round_seconds

    @property
    def most_seconds(self) -> float:
        """No round is begun that would end later than this."""
        return max(LEAST_LIMIT_SECONDS, MOST_OF_EXPECTED * self.expected_seconds)


def calibration_schedule(
    probe: BenchRow, context_length: int | None, concurrency: int, repetitions: int
) -> Schedule:
    """Choose cases and rounds.

    Args:
        probe: the measured ``PROBE``.
        context_length: of the server, None if it does not say.
        concurrency: sequences that the run holds at a time.
        repetitions: rounds that are wanted; fewer are made if they take longer than the budget.

    Raises:
        UsageError: if the context is too short to measure anything in it.
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
    """The cases to measure after the probe, by its figures; the others as above.

    Raises:
        UsageError: if the context is too short to measure anything in it.
    """
    answer = _bounded(
        decode_tokens_per_second * ANSWER_SECONDS, LEAST_ANSWER_TOKENS, MOST_ANSWER_TOKENS
    )
    room = (context_length or MOST_PROMPT_TOKENS) - MOST_ANSWER_TOKENS - 2
    if room < 2 * LEAST_PROMPT_TOKENS:
        raise UsageError(
            f"a context of {context_length} tokens is too short to calibrate in",
            "launch with --context 1024 or more",
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
    """What was measured so far, and whether there is time for more."""

    schedule: Schedule
    now: Callable[[], float] = time.monotonic
    _samples: dict[BenchCase, list[Sample]] = field(default_factory=dict)
    _clocks: dict[BenchCase, Clock] = field(default_factory=dict)
    _started: float = field(init=False)

    def __post_init__(self) -> None:
        self._started = self.now()

    def add(self, done: RepetitionDone) -> None:
        """Note one repetition."""
        self._samples.setdefault(done.case, []).append(done.sample)
        self._clocks[done.case] = done.clock

    @property
    def complete(self) -> int:
        """Rounds in which every case was measured."""
        return min(len(self._samples.get(case, ())) for case in self.schedule.cases)

    @property
    def seconds_left(self) -> float:
        """Until the last round is done, at the pace so far."""
        measured = sum(map(len, self._samples.values()))
        all_of_them = self.schedule.rounds * len(self.schedule.cases)
        if not measured:
            return self.schedule.expected_seconds
        return (self.now() - self._started) / measured * (all_of_them - measured)

    def enough(self) -> bool:
        """Whether another round would end after the time that was said."""
        used = self.now() - self._started
        return used + used / max(self.complete, 1) > self.schedule.most_seconds

    def rows(self) -> Sequence[BenchRow]:
        """Of the complete rounds: every case equally often."""
        return [
            BenchRow(case, self._clocks[case], tuple(self._samples[case][: self.complete]))
            for case in self.schedule.cases
            if self.complete
        ]
