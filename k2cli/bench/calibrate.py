"""What ``k2 bench --calibrate`` makes of its measurements: figures, and rates that are kept."""

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
    """What was measured, for the solver: of each case its answers, and of a single one its prompts.

    Prompts by the client's clock until the first token, which next to their seconds adds
    milliseconds. The context of an answer is that in its middle. Medians: a moment in which the
    machine did something else should not count. How much repetitions differ goes along, so that
    the solver trusts a noisy figure less.
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
    names the figures that deviate by more than a machine does that has nothing else to do.
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
    """Solve for the rates of a run's machines, and keep them for ``plan-memory``.

    Args:
        plan: the run's.
        nodes: its machines as they are, by rank.
        transport: what connects its ranks.
        rows: the measurements of ``calibration_rounds.calibration_cases``.

    Raises:
        K2Error: if the model's files cannot be read, or the calibration cannot be kept.
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
    """What a token costs in the placement of a run."""
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
    """The calibration as it appears in JSON; rates per second, times in seconds."""
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
