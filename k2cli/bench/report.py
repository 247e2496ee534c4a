"""The result of a benchmark: rows with their raw samples, and what they were measured on."""

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
        tokens_per_second: of all concurrent requests together.
        seconds: what was divided by.
        first_token_seconds: from sending a request to its first token, by the client's clock;
            the mean over concurrent requests.
    """

    tokens_per_second: float
    seconds: float
    first_token_seconds: float


@dataclass(frozen=True, slots=True)
class BenchRow:
    """A case and its samples. ``clock`` says whose clock the seconds are of."""

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
    """The run that was measured, if it is one of this machine's."""

    run_id: str
    transport: Transport
    strategy: str
    context_length: int
    nodes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class BenchReport:
    """Everything about a benchmark."""

    model: str
    url: str
    rows: tuple[BenchRow, ...]
    run: RunDescription | None
    environment: dict[str, str | None]
    started: str

    @property
    def placement(self) -> str:
        """``pipeline, 2 ranks, mpi``; the server's address where no more is known."""
        if self.run is None:
            return self.url
        ranks = len(self.run.nodes)
        count = f"{ranks} rank{'s' if ranks > 1 else ''}"
        return f"{self.run.strategy}, {count}, {self.run.transport}"


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and sample standard deviation; one value has no deviation."""
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return statistics.fmean(values), deviation


def describe_environment() -> dict[str, str | None]:
    """Versions and machine of this client, which is where a local run is served too."""
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
    """A row as it appears in JSON; durations in seconds."""
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
    """What all rows of a report have in common, as it appears in JSON."""
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
    """The JSON document of a benchmark."""
    return {**report_members(report), "rows": [row_members(row) for row in report.rows]}
