"""Evaluation of the constants on rows that they were not fitted to."""

from __future__ import annotations

import hashlib
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from benchmarks.speed_fit.fit import fit
from benchmarks.speed_fit.model import Constants, errors, predicted_band
from benchmarks.speed_fit.rows import FIRST_ADDED_ROW, Observation, Quantity

LEAST_SPREAD = 0.15
SPREAD_SHARE = 0.9
FOLDS = 5


Spreads = Mapping[tuple[str, Quantity], float]
"""Half widths of the bands, as natural logarithms, by engine and quantity."""


@dataclass(frozen=True, slots=True)
class Prediction:
    """A published figure beside what the model says, in tokens per second."""

    row: Observation
    low: float
    expected: float
    high: float

    @property
    def error(self) -> float:
        """Relative: 0.1 is ten percent too fast."""
        return self.expected / self.row.value - 1

    @property
    def inside(self) -> bool:
        """True if the published figure lies in the band."""
        return self.low <= self.row.value <= self.high


@dataclass(frozen=True, slots=True)
class Summary:
    """Summary of predictions: count, share inside the band, median absolute error, widest band."""

    count: int
    inside: float
    median_error: float
    widest: float


def summarise(predictions: Sequence[Prediction]) -> Summary:
    """Summarise a set of predictions that is not empty."""
    return Summary(
        len(predictions),
        sum(one.inside for one in predictions) / len(predictions),
        statistics.median(abs(one.error) for one in predictions),
        max(one.high / one.low for one in predictions),
    )


def predict(
    rows: Iterable[Observation], constants: Constants, spreads: Spreads
) -> list[Prediction]:
    """Predict each row as ``plan-memory`` would."""
    bands = (
        (row, predicted_band(row, constants, spreads[row.engine, row.quantity])) for row in rows
    )
    return [Prediction(row, band.low, band.expected, band.high) for row, band in bands]


def spreads_of(rows: Sequence[Observation]) -> Spreads:
    """Half widths of the bands: what nine of ten rows err by if their source was not fitted to.

    Taken from the rows that are fitted to, by leaving out one source after the other, so that the
    rows held out have no say in it. Rows of long contexts have none either: a range of its own
    covers what is unknown about these.
    """
    left_out: dict[tuple[str, Quantity], list[float]] = {}
    for source in sorted({row.source for row in rows}):
        rest = fit([row for row in rows if row.source != source])
        own = [row for row in rows if row.source == source and row.row < FIRST_ADDED_ROW]
        for row, error in zip(own, errors(own, rest), strict=True):
            left_out.setdefault((row.engine, row.quantity), []).append(abs(error))
    most = math.log(2) / 2
    return {
        kind: round(min(max(_quantile(found, SPREAD_SHARE), LEAST_SPREAD), most), 3)
        for kind, found in left_out.items()
    }


def _quantile(values: Sequence[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, math.ceil(share * len(ordered)) - 1)]


def by_fold(rows: Sequence[Observation], spreads: Spreads, *, by_source: bool) -> list[Prediction]:
    """Each row predicted by a fit to the others: without its fifth, or without its whole source."""

    def fold(row: Observation) -> str:
        if by_source:
            return row.source
        return str(int(hashlib.sha256(row.row.encode()).hexdigest(), 16) % FOLDS)

    found: list[Prediction] = []
    for name in sorted({fold(row) for row in rows}):
        constants = fit([row for row in rows if fold(row) != name])
        found += predict([row for row in rows if fold(row) == name], constants, spreads)
    return found
