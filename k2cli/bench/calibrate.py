"""What ``k2 bench --calibrate`` measures: few cases, sized so that each takes seconds.

A short and a long prompt tell compute from attention, generation after each of them tells reading
from what grows with the context, and two requests at a time what rows share.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from k2cli.bench.cases import BenchCase
from k2cli.bench.report import BenchRow
from k2cli.errors import UsageError
from k2cli.planning.calibration import Calibration, MeasuredFigure, calibrate

if TYPE_CHECKING:
    from k2cli.planning.hardware import NodeMemory
    from k2cli.planning.plan import Plan

PROBE = BenchCase("pp", 32)
"""The first case: how fast prompts are, so that the sizes of the others can be chosen."""
GENERATED_TOKENS = 32
SHORT_SECONDS, LONG_SECONDS = 1.5, 6.0
LEAST_PROMPT_TOKENS, MOST_PROMPT_TOKENS = 32, 8192


def calibration_cases(
    probed_tokens_per_second: float, context_length: int | None, concurrency: int
) -> list[BenchCase]:
    """The cases to measure after the probe.

    Args:
        probed_tokens_per_second: prompt tokens per second of the probe.
        context_length: of the server, None if it does not say.
        concurrency: sequences that the run holds at a time.

    Raises:
        UsageError: if the context is too short to measure anything in it.
    """
    room = (context_length or MOST_PROMPT_TOKENS) - GENERATED_TOKENS - 2
    if room < 2 * LEAST_PROMPT_TOKENS:
        raise UsageError(
            f"a context of {context_length} tokens is too short to calibrate in",
            "launch with --context 1024 or more",
        )
    longest = min(room, MOST_PROMPT_TOKENS)
    short = _bounded(probed_tokens_per_second * SHORT_SECONDS, longest // 2)
    long = max(_bounded(probed_tokens_per_second * LONG_SECONDS, longest), 2 * short)
    cases = [
        BenchCase("pp", short),
        BenchCase("pp", long),
        BenchCase("tg", GENERATED_TOKENS, short),
        BenchCase("tg", GENERATED_TOKENS, long),
    ]
    if concurrency > 1:
        cases.append(BenchCase("tg", GENERATED_TOKENS, short, 2))
    return cases


def _bounded(tokens: float, most: int) -> int:
    return max(LEAST_PROMPT_TOKENS, min(int(tokens), most))


def figures_of(rows: Sequence[BenchRow]) -> list[MeasuredFigure]:
    """What was measured, for the solver. The context of generation is that in its middle.

    Medians: a moment in which the machine did something else should not count. How much
    repetitions differ goes along, so that the solver trusts a noisy figure less.
    """
    figures = []
    for row in rows:
        case, rates = row.case, [*row.rates, *_prompts_before_answers(row.case, rows)]
        rate, deviation = statistics.median(rates), deviation_of(rates)
        if case.kind == "pp":
            figures.append(
                MeasuredFigure("prefill", case.tokens, case.concurrency, rate, deviation)
            )
        else:
            middle = case.prompt_tokens + case.tokens // 2
            figures.append(MeasuredFigure("decode", middle, case.concurrency, rate, deviation))
    return figures


def _prompts_before_answers(case: BenchCase, rows: Sequence[BenchRow]) -> list[float]:
    """Prompt tokens per second, of the same prompts, as seen where an answer followed them.

    By the client's clock, which next to seconds of prefill adds milliseconds: twice as many
    samples for nothing.
    """
    if case.kind != "pp":
        return []
    alike = [
        row
        for row in rows
        if (row.case.kind, row.case.prompt_tokens, row.case.concurrency)
        == ("tg", case.prompt_tokens, case.concurrency)
    ]
    return [case.prompt_tokens / seconds for row in alike for seconds in row.first_token]


def deviation_of(rates: Sequence[float]) -> float:
    """What repetitions differ by: the standard deviation of their logarithms, by quartiles.

    Quartiles, since one repetition that something else fell into says nothing of the others; 0 for
    fewer than three. The quartiles of a normal distribution are 1.349 deviations apart.
    """
    if len(rates) < 3:
        return 0.0
    low, _, high = statistics.quantiles(map(math.log, rates), n=4, method="inclusive")
    return (high - low) / 1.349


@dataclass(frozen=True, slots=True)
class Calibrated:
    """What came of it, and the file that it is kept in.

    ``variation`` is the largest difference between repetitions of one case, relative to them;
    ``deviation`` the largest standard deviation of a case, less what single ones did. ``noisy``
    names the cases that deviate by more than a machine does that has nothing else to do.
    """

    found: Calibration
    figures: tuple[MeasuredFigure, ...]
    variation: float
    deviation: float
    noisy: tuple[str, ...]
    file: Path


def calibrate_run(
    plan: Plan, nodes: Sequence[NodeMemory], backend: str, rows: Sequence[BenchRow]
) -> Calibrated:
    """Solve for the rates of a run's machines, and keep them for ``plan-memory``.

    Args:
        plan: the run's.
        nodes: its machines as they are, by rank.
        backend: what connects its ranks.
        rows: the measurements of ``calibration_cases``.

    Raises:
        K2Error: if the model's files cannot be read, or the calibration cannot be kept.
    """
    from k2cli.planning.calibrated import (
        NOISY_DEVIATION,
        CalibratedMachines,
        machines_of,
        save_calibration,
    )
    from k2cli.planning.subject import read_subject
    from k2cli.planning.work import model_work

    subject = read_subject(plan.model.reference)
    placement = plan.placement
    work = model_work(
        subject.config,
        stored=subject.stored,
        dtype=plan.request.dtype,
        slices=placement.size if placement.strategy == "tensor" else 1,
        head=placement.head,
    )
    figures = tuple(figures_of(rows))
    found = calibrate(
        work,
        placement,
        nodes,
        backend=backend,
        chunk_tokens=plan.request.prefill_chunk_tokens,
        figures=figures,
    )
    deviation = max(figure.deviation for figure in figures)
    entry = CalibratedMachines(
        machines=machines_of(nodes),
        backend=backend,
        model=plan.model.reference,
        measured_on=datetime.now(UTC).date().isoformat(),
        rates=found.rates,
        collective_seconds=found.collective_seconds,
        deviation=deviation,
    )
    variation = max((max(row.rates) - min(row.rates)) / min(row.rates) for row in rows)
    noisy = tuple(
        row.case.name
        for row, figure in zip(rows, figures, strict=True)
        if figure.deviation > NOISY_DEVIATION
    )
    return Calibrated(found, figures, variation, deviation, noisy, save_calibration(entry))


def calibrated_members(calibrated: Calibrated) -> dict[str, Any]:
    """The calibration as it appears in JSON; rates per second, times in seconds."""
    return {
        "rates": asdict(calibrated.found.rates),
        "collective_seconds": calibrated.found.collective_seconds,
        "figures": [
            {**asdict(figure), "model_error": error}
            for figure, error in zip(calibrated.figures, calibrated.found.errors, strict=True)
        ],
        "variation": calibrated.variation,
        "deviation": calibrated.deviation,
        "noisy": list(calibrated.noisy),
        "file": str(calibrated.file),
    }
