"""The fit of the constants for NVIDIA's GPUs, to k2's own figures in ``cuda.toml``.

There are a dozen figures of one kind of GPU and one model, and nothing is held out. So the band is
as wide as the farthest round demands, and other GPUs get the widest band there is.
"""

from __future__ import annotations

import functools
import math
import statistics
import tempfile
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.full_width.tensors import FULL_WIDTH, write_headers
from k2cli.planning.hardware.machine import NodeMemory
from k2cli.planning.hardware.spec import parse_hardware
from k2cli.planning.model import read_model
from k2cli.planning.speed.constants import LinkRates, Shares, effective_rates
from k2cli.planning.speed.placement_time import PlacementTime
from k2cli.planning.speed.work import ModelWork, model_work
from k2cli.sharding.placement import Placement, RankPlacement

FIGURES = Path(__file__).parent / "cuda.toml"
CHUNK_TOKENS = 2048

# Value before any measurement, and the standard deviation of its logarithm. MLX's quantized kernels
# for CUDA reach far less of the tensor cores' peak than those for Metal of a Mac's.
PRIORS: Mapping[str, tuple[float, float]] = {
    "bandwidth": (0.8, 0.2),
    "dense_compute": (0.1, 1.0),
    "expert_compute": (0.02, 1.0),
    "attention_compute": (0.1, 0.7),
    "dense_layer_seconds": (300e-6, 0.3),
    "expert_layer_seconds": (400e-6, 0.5),
    "rows_share": (0.1, 1.5),
    "nccl_seconds": (48e-6, 0.7),
    "ring_seconds": (833e-6, 0.3),
}
BYTES_PER_SECOND = {"nccl": 1e11, "ring": 1.5e9}
"""Assumed for NCCL over NVLink; the ring's follow from a prompt of 2,048 tokens over both."""
ALONE_SECONDS = {"nccl": 48e-6, "ring": 833e-6}
"""A sum of 14 KB in a chain of 20, without a model."""
# Not measured: NCCL over PCIe and over a network of 200 Gb/s, assumed to be some times slower.
_PCIE = LinkRates(30e-6, 150e-6, 400e-6, 1.5e10)
_NETWORK = LinkRates(50e-6, 250e-6, 600e-6, 1e10)
_SPREAD = 0.12
_DIGITS = 3
_LEAST_SPREAD = 0.2
"""More than for Apple's chips, since nothing is held out."""


@dataclass(frozen=True, slots=True)
class CudaFigure:
    """One measured figure: its median and all rounds, in tokens per second."""

    name: str
    run: PlacementTime
    transport: str
    tokens: int
    concurrency: int
    rounds: tuple[float, ...]

    @property
    def value(self) -> float:
        return statistics.median(self.rounds)

    @property
    def is_prefill(self) -> bool:
        return self.concurrency == 0


@dataclass(frozen=True, slots=True)
class CudaOutcome:
    """The constants, the figures with what the model says, and the half width of the bands."""

    constants: dict[str, float]
    figures: tuple[CudaFigure, ...]
    predicted: tuple[float, ...]
    spread: float
    measured_links: Mapping[str, LinkRates]
    about: Mapping[str, Any]

    @property
    def shares(self) -> Shares:
        return shares_of(self.constants)

    @property
    def links(self) -> dict[str, LinkRates]:
        """The kinds of link between GPUs, by the names in ``constants.toml``."""
        return {
            "nccl": self.measured_links["nccl"],
            "ring-cuda": self.measured_links["ring"],
            "nccl-pcie": _PCIE,
            "nccl-network": _NETWORK,
        }


@functools.cache
def figures_table() -> dict[str, Any]:
    """Return the measured figures."""
    return tomllib.loads(FIGURES.read_text(encoding="utf-8"))


def run_cuda_fit() -> CudaOutcome:
    """Fit the constants; takes a second."""
    table = figures_table()
    figures = _figures(table)
    constants = _fit(figures)
    errors = _errors(figures, constants)
    predicted = tuple(
        figure.value * math.exp(error) for figure, error in zip(figures, errors, strict=True)
    )
    links = {name: _ranged(figures, constants, name) for name in BYTES_PER_SECOND}
    beyond = (_beyond_the_link(each, constants, links) for each in figures)
    rounded = math.ceil(max(_LEAST_SPREAD, *beyond) * 1000) / 1000
    return CudaOutcome(constants, figures, predicted, rounded, links, table)


def shares_of(constants: Mapping[str, float]) -> Shares:
    """Return the shares in the form of the package's constants."""
    return Shares(
        bandwidth_one_die=constants["bandwidth"],
        bandwidth_two_dies=constants["bandwidth"],
        dense_compute=constants["dense_compute"],
        expert_compute=constants["expert_compute"],
        attention_compute=constants["attention_compute"],
        dense_layer_seconds=constants["dense_layer_seconds"],
        expert_layer_seconds=constants["expert_layer_seconds"],
        rows_share=constants["rows_share"],
    )


def _link(constants: Mapping[str, float], transport: str) -> LinkRates:
    """Return a kind of link without a range; a run of one rank has none."""
    name = transport if transport in BYTES_PER_SECOND else "ring"
    seconds = constants[f"{name}_seconds"]
    return LinkRates(seconds, seconds, seconds, BYTES_PER_SECOND[name])


def _ranged(
    figures: Sequence[CudaFigure], constants: Mapping[str, float], transport: str
) -> LinkRates:
    """Return a link with the range of seconds per sum that explains every round of decoding."""
    link = _link(constants, transport)
    found = [link.collective_seconds]
    for figure in figures:
        if figure.is_prefill or figure.transport != transport or figure.run.is_pipeline:
            continue
        modelled = figure.concurrency / _speed(figure, _with(figure, constants))
        beyond = (figure.concurrency / rate - modelled for rate in figure.rounds)
        sums = figure.run.work.collectives
        found += [link.collective_seconds + each / sums for each in beyond]
    low = max(min(found), ALONE_SECONDS[transport])
    return replace(
        link,
        collective_seconds_low=min(_rounded(low), link.collective_seconds),
        collective_seconds_high=_rounded(max(found)),
    )


# --- the figures ----------------------------------------------------------------------------------


def _figures(table: Mapping[str, Any]) -> tuple[CudaFigure, ...]:
    found = []
    with tempfile.TemporaryDirectory() as temporary:
        works = _Works(Path(temporary))
        for run in table["runs"]:
            timed = _run_of(run, works)
            for name, tokens, concurrency in (
                ("decode", table["decode_context"], 1),
                ("decode_8", table["decode_context"], 8),
                ("prefill_2048", 2048, 0),
                ("prefill_16384", 16384, 0),
            ):
                if name in run:
                    rounds = tuple(float(each) for each in run[name])
                    found.append(
                        CudaFigure(name, timed, run["transport"], tokens, concurrency, rounds)
                    )
    return tuple(found)


class _Works:
    """The work of the measured models, traced once each."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @functools.cache  # noqa: B019  # lives as long as one fit
    def of(self, layers: int, slices: int) -> ModelWork:
        """Return the work of a rank of a model with so many layers."""
        folder = self._folder / str(layers)
        if not folder.exists():
            write_headers(folder, replace(FULL_WIDTH, layers=layers))
        model = read_model(str(folder))
        return model_work(
            model.config,
            stored=model.stored,
            dtype="bfloat16",
            slices=slices,
            head="sharded" if slices > 1 else "replicated",
        )


def _run_of(run: Mapping[str, Any], works: _Works) -> PlacementTime:
    """Return the placement of a run, with rates and link yet to be set."""
    layers, ranks, strategy = run["layers"], run["cards"], run["strategy"]
    work = works.of(layers, ranks if strategy == "tensor" else 1)
    ranges = [(0, layers)] * ranks
    if strategy == "pipeline":  # rank 0 is the last stage; k2 cut these layers 6/4
        ranges = [(6, layers), (0, 6)]
    parts = tuple(RankPlacement(r, f"card {r}", span) for r, span in enumerate(ranges))
    placement = Placement(strategy, parts, "sharded" if strategy == "tensor" else "replicated")
    machines = tuple(part.node for part in parts)
    start = {name: value for name, (value, _) in PRIORS.items()}
    rates = (_rates(start),) * ranks
    return PlacementTime(work, placement, machines, rates, _link(start, "ring"))


@functools.cache
def _card() -> NodeMemory:
    return parse_hardware(figures_table()["chip"])[0]


def _rates(constants: Mapping[str, float]) -> Any:
    card = _card()
    assert card.bandwidth_bytes_per_second is not None
    assert card.gpu_flops_per_second is not None
    return effective_rates(
        shares_of(constants),
        card.bandwidth_bytes_per_second,
        card.gpu_flops_per_second,
        two_dies=False,
    )


# --- the fit --------------------------------------------------------------------------------------


def _with(figure: CudaFigure, constants: Mapping[str, float]) -> PlacementTime:
    rates = (_rates(constants),) * figure.run.placement.size
    return replace(figure.run, rates=rates, link=_link(constants, figure.transport))


def _speed(figure: CudaFigure, run: PlacementTime) -> float:
    if figure.is_prefill:
        return figure.tokens / run.first_token_seconds(figure.tokens, CHUNK_TOKENS)
    return figure.concurrency / run.round_seconds(figure.tokens, figure.concurrency)


def _errors(figures: Sequence[CudaFigure], constants: Mapping[str, float]) -> list[float]:
    return [math.log(_speed(each, _with(each, constants)) / each.value) for each in figures]


def _beyond_the_link(
    figure: CudaFigure, constants: Mapping[str, float], links: Mapping[str, LinkRates]
) -> float:
    """Return how far the farthest round is outside what the range of the link explains."""
    run = _with(figure, constants)
    run = replace(run, link=links.get(figure.transport, run.link))
    speeds = [_speed(figure, each) for each in (run, run.slower(), run.faster())]
    return max(
        max(math.log(each / max(speeds)), math.log(min(speeds) / each)) for each in figure.rounds
    )


def _fit(figures: Sequence[CudaFigure]) -> dict[str, float]:
    """Gauss-Newton in the logarithms of the constants, with the priors as further rows."""
    names = list(PRIORS)
    centre = np.array([math.log(PRIORS[name][0]) for name in names])
    spread = np.array([PRIORS[name][1] for name in names])
    at = centre.copy()

    def errors(point: Any) -> Any:
        return np.array(_errors(figures, _constants(names, point)))

    for _ in range(60):
        error = errors(at)
        slopes = np.empty((len(figures), len(names)))
        for index in range(len(names)):
            moved = at.copy()
            moved[index] += 1e-4
            slopes[:, index] = (errors(moved) - error) / 1e-4
        normal = slopes.T @ slopes / _SPREAD**2 + np.diag(1 / spread**2)
        pull = slopes.T @ error / _SPREAD**2 + (at - centre) / spread**2
        at = at - np.clip(np.linalg.solve(normal, pull), -0.3, 0.3)
    return {name: _rounded(value) for name, value in _constants(names, at).items()}


def _rounded(value: float) -> float:
    return float(f"{value:.{_DIGITS - 1}e}")


def _constants(names: Sequence[str], logarithms: Any) -> dict[str, float]:
    return {name: math.exp(value) for name, value in zip(names, logarithms, strict=True)}
