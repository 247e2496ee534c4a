"""The calibration: solves the speed model for the rates of the owner's machines, from a benchmark.

The model that predicts is inverted: it searches for rates at which it predicts the measured
figures. A few figures cannot determine all rates (a model without experts has no expert rate), so
each starts from a prior: published figures of the chip and fitted shares, or for an unknown machine
the measured figures themselves. Pure functions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from k2cli.choices import Transport
from k2cli.errors import K2Error
from k2cli.planning.hardware.machine import NodeMemory, NodeRates
from k2cli.planning.speed.constants import LinkRates, SpeedConstants, fitted_constants
from k2cli.planning.speed.placement_time import PlacementTime
from k2cli.planning.speed.work import ModelWork
from k2cli.sharding.placement import Placement

MEASURED_SPREAD = 0.04
"""The standard deviation of the logarithms of repeated measurements."""
CONCURRENT_SPREAD = 0.3
"""The same for several requests at a time. The model knows less about them (ranks that share a
machine, kernels for a few rows), so they must not distort the fit to single requests."""
_KNOWN_SPREAD, _UNKNOWN_SPREAD, _RATIO_SPREAD, _FIXED_SPREAD = 0.3, 2.0, 0.4, 1.0
_ROUNDS = 60
_STEP = 1e-5


@dataclass(frozen=True, slots=True)
class MeasuredFigure:
    """Tokens per second of all ``concurrency`` requests together.

    ``tokens`` counts those in the cache (decode), or of the prompt (prefill, until the first
    token). ``deviation`` is the standard deviation of the logarithms of repeated measurements.
    """

    kind: Literal["decode", "prefill"]
    tokens: int
    concurrency: int
    tokens_per_second: float
    deviation: float = 0.0

    @property
    def name(self) -> str:
        """``decode at 64 tokens``, with the number of requests if there are several."""
        several = f", {self.concurrency} requests" if self.concurrency > 1 else ""
        return f"{self.kind} at {self.tokens} tokens{several}"


@dataclass(frozen=True, slots=True)
class Calibration:
    """The rates of each machine of the run, assumed to be alike, and their errors.

    ``collective_seconds`` is None for one rank. ``errors`` compare the model at these rates with
    each figure: 0.1 is ten percent too fast. ``spread`` is one standard deviation of each value, as
    a share, from the noise of the figures and from how well they determine the value.
    """

    rates: NodeRates
    collective_seconds: float | None
    errors: tuple[float, ...]
    spread: Mapping[str, float] = field(default_factory=dict)


def calibrate(
    work: ModelWork,
    placement: Placement,
    nodes: Sequence[NodeMemory],
    *,
    transport: Transport,
    chunk_tokens: int,
    figures: Sequence[MeasuredFigure],
    constants: SpeedConstants | None = None,
) -> Calibration:
    """Find the rates at which the model predicts the measured figures.

    Args:
        nodes: as planned, one per rank; ``measured`` is ignored.
        chunk_tokens: the prefill chunk of the plan.
        figures: at least one of decode and one of prefill.

    Raises:
        K2Error: if there are too few figures.
    """
    constants = constants or fitted_constants()
    if {figure.kind for figure in figures} != {"decode", "prefill"}:
        raise K2Error("a calibration needs figures of decode and of prefill")
    run, start, likely = _before(work, placement, nodes, transport, figures, constants)

    def errors(at: Mapping[str, float]) -> list[float]:
        tried = _with(run, at)
        return [
            math.log(_speed(tried, one, chunk_tokens) / one.tokens_per_second) for one in figures
        ]

    found, spread = _most_likely(errors, [_certainty(one) for one in figures], start, likely)
    tried = _with(run, found)
    return Calibration(
        rates=tried.rates[0],
        collective_seconds=tried.link.collective_seconds if placement.size > 1 else None,
        errors=tuple(math.expm1(error) for error in errors(found)),
        spread={name: spread[short] for short, name in _STATED.items() if short in spread},
    )


def _certainty(of: MeasuredFigure) -> float:
    return max(CONCURRENT_SPREAD if of.concurrency > 1 else MEASURED_SPREAD, of.deviation)


_STATED = {
    "read": "read_bytes_per_second",
    "dense": "dense_flops_per_second",
    "dense_layer": "dense_layer_seconds",
    "collective": "collective_seconds",
}
"""Unknowns that are shown, with their names in JSON. The others are shares of these."""


def _before(
    work: ModelWork,
    placement: Placement,
    nodes: Sequence[NodeMemory],
    transport: Transport,
    figures: Sequence[MeasuredFigure],
    constants: SpeedConstants,
) -> tuple[PlacementTime, dict[str, float], dict[str, float]]:
    """Return the run without its rates, the start values, and their prior spread."""
    link = constants.links[_link_name(nodes, transport)]
    places = tuple(node.place for node in nodes)
    known = constants.rates(replace(nodes[0], measured=None))
    loads = known.load_bytes_per_second if known else None
    unknown = replace(NodeRates(*[1.0] * 6), load_bytes_per_second=loads)
    run = PlacementTime(work, placement, places, (unknown,) * len(places), link)
    return run, *_start(run, known or _guess(work, figures, constants), known is not None)


def _link_name(nodes: Sequence[NodeMemory], transport: Transport) -> str:
    if all(node.device == "cuda" for node in nodes):
        return "nccl" if transport == "nccl" else "ring-cuda"
    if len({node.name for node in nodes}) == 1:
        return "local"
    return transport if transport in ("jaccl", "ring", "mpi", "nccl") else "ring"


def _speed(run: PlacementTime, figure: MeasuredFigure, chunk_tokens: int) -> float:
    if figure.kind == "decode":
        seconds = run.round_seconds(figure.tokens, figure.concurrency)
        return figure.concurrency / seconds
    return figure.tokens / run.first_token_seconds(figure.tokens, chunk_tokens)


def _guess(
    work: ModelWork, figures: Sequence[MeasuredFigure], constants: SpeedConstants
) -> NodeRates:
    """Estimate the rates of an unknown machine as if only its measured figures took time."""
    decode = max((one for one in figures if one.kind == "decode"), key=_single)
    prefill = max((one for one in figures if one.kind == "prefill"), key=lambda one: one.tokens)
    read = sum(layer.weights_read(1) for layer in work.layers) + work.head.dense_bytes
    flops = sum(layer.dense_flops + layer.expert_flops for layer in work.layers)
    shares = constants.shares
    matrices = flops * work.slices * prefill.tokens_per_second
    return NodeRates(
        read_bytes_per_second=read * work.slices * decode.tokens_per_second,
        dense_flops_per_second=matrices,
        expert_flops_per_second=matrices * shares.expert_compute / shares.dense_compute,
        attention_flops_per_second=matrices * shares.attention_compute / shares.dense_compute,
        dense_layer_seconds=shares.dense_layer_seconds,
        expert_layer_seconds=shares.expert_layer_seconds,
    )


def _single(figure: MeasuredFigure) -> tuple[bool, float]:
    return figure.concurrency == 1, figure.tokens_per_second


def _start(
    run: PlacementTime, rates: NodeRates, known: bool
) -> tuple[dict[str, float], dict[str, float]]:
    """Return start values, and the standard deviations of their logarithms."""
    dense = rates.dense_flops_per_second
    start = {
        "read": rates.read_bytes_per_second,
        "dense": dense,
        "expert_share": rates.expert_flops_per_second / dense,
        "attention_share": rates.attention_flops_per_second / dense,
        "dense_layer": rates.dense_layer_seconds,
        "expert_layer_share": rates.expert_layer_seconds / rates.dense_layer_seconds,
        "rows_share": rates.rows_share,
        "decode_attention_share": rates.decode_attention_share,
    }
    free = _KNOWN_SPREAD if known else _UNKNOWN_SPREAD
    fixed = _KNOWN_SPREAD if known else _FIXED_SPREAD
    spread = {
        "read": free,
        "dense": free,
        "expert_share": _RATIO_SPREAD,
        "attention_share": free,
        "dense_layer": fixed,
        "expert_layer_share": _RATIO_SPREAD,
        "rows_share": _FIXED_SPREAD,
        "decode_attention_share": _FIXED_SPREAD,
    }
    if run.placement.size > 1:
        start["collective"] = run.link.collective_seconds
        spread["collective"] = _FIXED_SPREAD
    return start, spread


def _with(run: PlacementTime, at: Mapping[str, float]) -> PlacementTime:
    rates = NodeRates(
        read_bytes_per_second=at["read"],
        dense_flops_per_second=at["dense"],
        expert_flops_per_second=at["dense"] * at["expert_share"],
        attention_flops_per_second=at["dense"] * at["attention_share"],
        dense_layer_seconds=at["dense_layer"],
        expert_layer_seconds=at["dense_layer"] * at["expert_layer_share"],
        rows_share=at["rows_share"],
        decode_attention_share=at["decode_attention_share"],
        load_bytes_per_second=run.rates[0].load_bytes_per_second,
    )
    link: LinkRates = run.link
    if "collective" in at:
        link = replace(link, collective_seconds=at["collective"])
    return replace(run, rates=(rates,) * len(run.rates), link=link)


# --- least squares with priors, in the logarithms -----------------------------------------------


def _most_likely(
    errors: Callable[[Mapping[str, float]], list[float]],
    certainty: Sequence[float],
    start: Mapping[str, float],
    spread: Mapping[str, float],
) -> tuple[dict[str, float], dict[str, float]]:
    """Run Gauss-Newton with step halving; the few unknowns need no numpy.

    Returns:
        Each unknown's value, and the standard deviation of its logarithm.
    """
    names = list(start)

    def values(at: Sequence[float]) -> dict[str, float]:
        return {name: start[name] * math.exp(x) for name, x in zip(names, at, strict=True)}

    def residuals(at: Sequence[float]) -> list[float]:
        own = [error / by for error, by in zip(errors(values(at)), certainty, strict=True)]
        return own + [x / spread[name] for name, x in zip(names, at, strict=True)]

    at = [0.0] * len(names)
    current = residuals(at)
    for _ in range(_ROUNDS):
        slopes = [_slope(residuals, at, current, index) for index in range(len(names))]
        normal = _normal(slopes)
        change = _solve(normal, [_dot(one, current) for one in slopes])
        moved = _shorter_until_better(residuals, at, current, change)
        if moved is None:
            break
        gained = _dot(current, current)
        at, current = moved
        if gained - _dot(current, current) < 1e-9 * gained:
            break
    normal = _normal([_slope(residuals, at, current, index) for index in range(len(names))])
    return values(at), {
        name: math.sqrt(_solve(normal, [float(i == index) for i in range(len(names))])[index])
        for index, name in enumerate(names)
    }


def _normal(slopes: Sequence[Sequence[float]]) -> list[list[float]]:
    return [[_dot(one, other) for other in slopes] for one in slopes]


def _slope(
    residuals: Callable[[Sequence[float]], list[float]],
    at: Sequence[float],
    current: Sequence[float],
    index: int,
) -> list[float]:
    moved = list(at)
    moved[index] += _STEP
    return [(new - old) / _STEP for new, old in zip(residuals(moved), current, strict=True)]


def _shorter_until_better(
    residuals: Callable[[Sequence[float]], list[float]],
    at: Sequence[float],
    current: Sequence[float],
    change: Sequence[float],
) -> tuple[list[float], list[float]] | None:
    longest = max(map(abs, change), default=0.0)
    share = min(1.0, 1.0 / longest) if longest else 0.0
    for _ in range(12):
        moved = [x - share * step for x, step in zip(at, change, strict=True)]
        found = residuals(moved)
        if _dot(found, found) < _dot(current, current):
            return moved, found
        share /= 2
    return None


def _dot(one: Sequence[float], other: Sequence[float]) -> float:
    return sum(a * b for a, b in zip(one, other, strict=True))


def _solve(matrix: list[list[float]], right: list[float]) -> list[float]:
    """Solve by Gaussian elimination; the priors keep the matrix positive definite."""
    size = len(right)
    rows = [[*row, value] for row, value in zip(matrix, right, strict=True)]
    for column in range(size):
        pivot = max(range(column, size), key=lambda index: abs(rows[index][column]))
        rows[column], rows[pivot] = rows[pivot], rows[column]
        for below in range(column + 1, size):
            share = rows[below][column] / rows[column][column]
            for index in range(column, size + 1):
                rows[below][index] -= share * rows[column][index]
    found = [0.0] * size
    for row in reversed(range(size)):
        rest = sum(rows[row][index] * found[index] for index in range(row + 1, size))
        found[row] = (rows[row][size] - rest) / rows[row][row]
    return found
