"""Calibration of ``k2 bench --calibrate``: figures from measurements, and the saved rates."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from k2cli.bench.report import BenchRow
from k2cli.choices import Transport
from k2cli.planning.speed.calibrate import Calibration, MeasuredFigure, calibrate

if TYPE_CHECKING:
    from k2cli.planning.hardware.machine import NodeMemory
    from k2cli.planning.plan import Plan
    from k2cli.planning.speed.calibrations import CalibratedMachines
    from k2cli.planning.speed.work import ModelWork


def figures_of(rows: Sequence[BenchRow]) -> list[MeasuredFigure]:
    """Convert rows to figures for the solver: decode of each case, prefill of single requests.

    Prefill is timed by the client's clock until the first token, which adds only milliseconds. The
    context length of a decode figure is that in the middle of the answer. Rates are medians, to
    ignore moments in which the machine did something else. The deviation of the repetitions lets
    the solver give noisy figures less weight.
    """
    figures = []
    for row in rows:
        case = row.case
        if case.concurrency == 1:
            prompts = [case.prompt_tokens / seconds for seconds in row.first_token]
            figures.append(_figure("prefill", case.prompt_tokens, 1, prompts))
        middle = case.prompt_tokens + case.tokens // 2
        figures.append(_figure("decode", middle, case.concurrency, row.rates))
    return figures


def _figure(
    kind: Literal["decode", "prefill"], tokens: int, concurrency: int, rates: Sequence[float]
) -> MeasuredFigure:
    return MeasuredFigure(kind, tokens, concurrency, statistics.median(rates), deviation_of(rates))


def deviation_of(rates: Sequence[float]) -> float:
    """Estimate the standard deviation of the rates' logarithms from quartiles.

    Quartiles ignore a single disturbed repetition. The quartiles of a normal distribution are 1.349
    standard deviations apart. The result for fewer than three rates is 0.
    """
    if len(rates) < 3:
        return 0.0
    low, _, high = statistics.quantiles(map(math.log, rates), n=4, method="inclusive")
    return (high - low) / 1.349


@dataclass(frozen=True, slots=True)
class Calibrated:
    """A calibration, and the file that it is saved in.

    ``variation`` is the largest relative difference between repetitions of one case; ``deviation``
    is the largest ``deviation_of`` a case, which ignores single outliers. ``noisy`` names the
    figures that deviate more than those of an idle machine.
    """

    found: Calibration
    figures: tuple[MeasuredFigure, ...]
    variation: float
    deviation: float
    noisy: tuple[str, ...]
    rounds: int
    file: Path


def calibrate_run(
    plan: Plan, nodes: Sequence[NodeMemory], transport: Transport, rows: Sequence[BenchRow]
) -> Calibrated:
    """Compute the rates of a run's machines, and save them for ``plan-memory``.

    Args:
        plan: the plan of the run.
        nodes: the machines of the run, by rank.
        transport: the transport between the ranks.
        rows: the measurements of ``calibration_rounds.calibration_cases``.

    Raises:
        K2Error: if the model's files cannot be read, or the calibration cannot be saved.
    """
    from k2cli.planning.speed.calibrations import NOISY_DEVIATION, save_calibration

    figures = tuple(figures_of(rows))
    found = calibrate(
        _work_of(plan),
        plan.placement,
        nodes,
        transport=transport,
        chunk_tokens=plan.request.prefill_chunk_tokens,
        figures=figures,
    )
    deviation = max(figure.deviation for figure in figures)
    variation = max((max(row.rates) - min(row.rates)) / min(row.rates) for row in rows)
    noisy = tuple(each.name for each in figures if each.deviation > NOISY_DEVIATION)
    file = save_calibration(_entry(plan, nodes, transport, found, deviation))
    return Calibrated(found, figures, variation, deviation, noisy, len(rows[0].samples), file)


def _work_of(plan: Plan) -> ModelWork:
    """Compute the work per token in the placement of a run."""
    from k2cli.planning.model import read_model
    from k2cli.planning.speed.work import model_work

    model = read_model(plan.model.reference)
    placement = plan.placement
    return model_work(
        model.config,
        stored=model.stored,
        dtype=plan.request.dtype,
        slices=placement.size if placement.strategy == "tensor" else 1,
        head=placement.head,
    )


def _entry(
    plan: Plan,
    nodes: Sequence[NodeMemory],
    transport: Transport,
    found: Calibration,
    deviation: float,
) -> CalibratedMachines:
    from k2cli.planning.speed.calibrations import CalibratedMachines, machines_of

    return CalibratedMachines(
        machines=machines_of(nodes),
        backend=transport,
        model=plan.model.reference,
        measured_on=datetime.now(UTC).date().isoformat(),
        rates=found.rates,
        collective_seconds=found.collective_seconds,
        deviation=deviation,
    )


def calibrated_members(calibrated: Calibrated) -> dict[str, Any]:
    """Return the JSON members of a calibration; rates per second, times in seconds."""
    return {
        "rates": asdict(calibrated.found.rates),
        "collective_seconds": calibrated.found.collective_seconds,
        "spread": dict(calibrated.found.spread),
        "rounds": calibrated.rounds,
        "figures": [
            {**asdict(figure), "model_error": error}
            for figure, error in zip(calibrated.figures, calibrated.found.errors, strict=True)
        ],
        "variation": calibrated.variation,
        "deviation": calibrated.deviation,
        "noisy": list(calibrated.noisy),
        "file": str(calibrated.file),
    }
