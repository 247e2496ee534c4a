"""Result of a benchmark: rows with their raw samples, and the run and machine measured."""

from __future__ import annotations

import platform
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal

from k2cli import __version__
from k2cli.bench.cases import BenchCase
from k2cli.choices import Transport

SCHEMA_VERSION = 1
Clock = Literal["server", "client"]


@dataclass(frozen=True, slots=True)
class Sample:
    """One repetition.

    Args:
        tokens_per_second: total of all concurrent requests.
        seconds: duration that the rate was computed from.
        first_token_seconds: time from sending a request to its first token, by the client's clock;
            the mean over concurrent requests.
    """

    tokens_per_second: float
    seconds: float
    first_token_seconds: float


@dataclass(frozen=True, slots=True)
class BenchRow:
    """A case and its samples; ``clock`` is the clock that measured the seconds."""

    case: BenchCase
    clock: Clock
    samples: tuple[Sample, ...]

    @property
    def rates(self) -> list[float]:
        """Tokens per second of each repetition."""
        return [sample.tokens_per_second for sample in self.samples]

    @property
    def first_token(self) -> list[float]:
        """Seconds to the first token of each repetition."""
        return [sample.first_token_seconds for sample in self.samples]


@dataclass(frozen=True, slots=True)
class RunDescription:
    """A measured run of this machine."""

    run_id: str
    transport: Transport
    strategy: str
    context_length: int
    nodes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class BenchReport:
    """Result of a benchmark; ``run`` is None for a server given by its URL."""

    model: str
    url: str
    rows: tuple[BenchRow, ...]
    run: RunDescription | None
    environment: dict[str, str | None]
    started: str

    @property
    def placement(self) -> str:
        """Placement such as ``pipeline, 2 ranks, mpi``, or the server's URL if it is unknown."""
        if self.run is None:
            return self.url
        ranks = len(self.run.nodes)
        count = f"{ranks} rank{'s' if ranks > 1 else ''}"
        return f"{self.run.strategy}, {count}, {self.run.transport}"


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float | None]:
    """Compute mean and sample standard deviation, which is None for a single value."""
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return statistics.fmean(values), deviation


def describe_environment() -> dict[str, str | None]:
    """Return versions and machine of this client, which also serves a local run."""
    return {
        "k2": __version__,
        "mlx": _version_of("mlx"),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()}",
        "machine": platform.machine(),
    }


def _version_of(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def row_members(row: BenchRow) -> dict[str, Any]:
    """Return the JSON members of a row; durations in seconds."""
    rate, rate_deviation = mean_and_deviation(row.rates)
    first, first_deviation = mean_and_deviation(row.first_token)
    return {
        "test": row.case.name,
        "kind": row.case.kind,
        "tokens": row.case.tokens,
        "depth": row.case.depth,
        "concurrency": row.case.concurrency,
        "repetitions": len(row.samples),
        "clock": row.clock,
        "tokens_per_second": rate,
        "tokens_per_second_deviation": rate_deviation,
        "first_token_seconds": first,
        "first_token_seconds_deviation": first_deviation,
        "samples": [
            {
                "tokens_per_second": sample.tokens_per_second,
                "seconds": sample.seconds,
                "first_token_seconds": sample.first_token_seconds,
            }
            for sample in row.samples
        ],
    }


def report_members(report: BenchReport) -> dict[str, Any]:
    """Return the JSON members that all rows of a report share."""
    run = report.run
    return {
        "schema_version": SCHEMA_VERSION,
        "model": report.model,
        "url": report.url,
        "started": report.started,
        "environment": report.environment,
        "run": None
        if run is None
        else {
            "run_id": run.run_id,
            "backend": run.transport,
            "strategy": run.strategy,
            "context_length": run.context_length,
            "ranks": len(run.nodes),
            "nodes": list(run.nodes),
        },
    }


def report_document(report: BenchReport) -> dict[str, Any]:
    """Return the JSON document of a benchmark."""
    return {**report_members(report), "rows": [row_members(row) for row in report.rows]}
