"""Measure two sides in turns, and make rows of the results."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from benchmarks.report import Row
from benchmarks.sides import Side
from benchmarks.statistics import Answer, order_of_round, ratios, summary
from benchmarks.work import BenchmarkModel, Work

Pair = tuple[Side, Side]
START_TARGET = 0.8
"""Below 1: without standby, a start runs its processes one after the other (decisions.md)."""


def say(text: str) -> None:
    """Write a line of progress to stderr."""
    sys.stderr.write(f"{time.strftime('%H:%M:%S')} {text}\n")
    sys.stderr.flush()


@dataclass
class Samples:
    """Answers of both sides to one piece of work, round by round."""

    ours: list[list[Answer]] = field(default_factory=list)
    theirs: list[list[Answer]] = field(default_factory=list)

    def equal(self) -> tuple[int, int]:
        """Return the number of equal answers, and the number of all answers."""
        pairs = [
            (a.content, b.content)
            for x, y in zip(self.ours, self.theirs, strict=True)
            for a, b in zip(x, y, strict=True)
        ]
        return sum(a == b for a, b in pairs), len(pairs)


@dataclass(frozen=True, slots=True)
class Comparison:
    """A comparison: two factories of sides, the model, the work, and the number of rounds."""

    placement: str
    model: BenchmarkModel
    make: tuple[Callable[[], Side], Callable[[], Side]]
    works: Sequence[Work]
    rounds: int
    starts: int


@contextlib.contextmanager
def _closing(sides: Sequence[Side]) -> Iterator[None]:
    try:
        yield
    finally:
        with contextlib.ExitStack() as stack:
            for side in sides:
                stack.callback(side.close)


def compare(comparison: Comparison) -> list[Row]:
    """Start both sides, give both the same work in turns, end both."""
    say(f"{comparison.model.title}, {comparison.placement}")
    rows = _start_rows(comparison) if comparison.starts > 1 else []
    if not comparison.works:
        return rows
    pair: Pair = (comparison.make[0](), comparison.make[1]())
    with _closing(pair):
        seconds = []
        for side in pair:
            seconds.append(side.start())
            side.hold()
        if comparison.starts == 1:
            rows += [_start_row(comparison, [seconds[0]], [seconds[1]])]
        rows += _work_rows(comparison, pair)
    return rows


def _start_rows(comparison: Comparison) -> list[Row]:
    seconds: tuple[list[float], list[float]] = ([], [])
    for number in range(comparison.starts):
        for index in order_of_round(number):
            side = comparison.make[index]()
            with _closing([side]):
                seconds[index].append(side.start())
    return [_start_row(comparison, *seconds)]


def _start_row(comparison: Comparison, ours: list[float], theirs: list[float]) -> Row:
    return Row(
        comparison.model.title,
        comparison.placement,
        "start to first answer",
        "s",
        summary(ours),
        summary(theirs),
        ratios(ours, theirs, more_is_better=False),
        target=START_TARGET,
    )


def _work_rows(comparison: Comparison, pair: Pair) -> list[Row]:
    samples = {work.key: Samples() for work in comparison.works}
    for work in comparison.works:  # a round that does not count: caches, code paths, buffers
        for side in pair:
            _ask(side, work, comparison.model.at_first, seed=999)
    for number in range(comparison.rounds):
        say(f"  round {number + 1} of {comparison.rounds}")
        for work in comparison.works:
            if number >= comparison.model.rounds_of(work, comparison.rounds):
                continue
            found = samples[work.key]
            for index in order_of_round(number):
                answers = _ask(pair[index], work, comparison.model, seed=number)
                (found.ours, found.theirs)[index].append(answers)
    return [
        row for work in comparison.works for row in _rows_of(comparison, work, samples[work.key])
    ]


def _ask(side: Side, work: Work, model: BenchmarkModel, seed: int) -> list[Answer]:
    side.let_go()
    try:
        return work.ask(side, model, seed)
    finally:
        side.hold()


def _rows_of(comparison: Comparison, work: Work, samples: Samples) -> list[Row]:
    equal, answers = samples.equal()
    rows = []
    for measure in work.measures:
        ours = [measure.read(round_) for round_ in samples.ours]
        theirs = [measure.read(round_) for round_ in samples.theirs]
        title = measure.title
        if work.is_long:
            title = f"prefill, {comparison.model.prefill_tokens} tokens"
        rows.append(
            Row(
                comparison.model.title,
                comparison.placement,
                title,
                measure.unit,
                summary(ours),
                summary(theirs),
                ratios(ours, theirs, more_is_better=measure.more_is_better),
                measure.target,
                equal,
                answers,
            )
        )
        say(f"  {title}: {rows[-1].ratio.median:.2f}")
    return rows
