"""Rows that show the gain of overlapping prefill: k2 on a pipeline of two against one rank.

Derived from rows that were measured against mlx-lm. With ``--only`` these may be of different runs:
they are compared only if they have the same number of rounds.
"""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.comparison import say
from benchmarks.report import Row
from benchmarks.statistics import ratios

TITLES = {
    "single": "one",
    "pipeline": "two, pipeline",
    "tensor": "two, tensor",
    "library": "one, without HTTP",
}
"""Titles of the placements in rows."""

OVERLAP = "two / one"
_TARGET = 1.6
"""Within 20 % of twice one rank."""


def overlap_rows(rows: Sequence[Row]) -> list[Row]:
    """Return a row for each prefill on a two-rank pipeline that was measured on one rank too."""
    found = []
    for row in rows:
        if row.placement == TITLES["pipeline"] and row.work.startswith("prefill"):
            found += _overlap(row, _alone(row, rows))
    return found


def _alone(row: Row, rows: Sequence[Row]) -> list[Row]:
    return [
        other
        for other in rows
        if other.work == row.work
        and other.model == row.model
        and other.placement in (TITLES["single"], TITLES["library"])
    ]


def _overlap(row: Row, alone: Sequence[Row]) -> list[Row]:
    if not alone:
        return []
    rounds = len(row.ours.samples)
    comparable = [one for one in alone if len(one.ours.samples) == rounds]
    if not comparable:
        others = " and ".join(str(len(one.ours.samples)) for one in alone)
        say(f"{row.model}, {row.work}: two ranks not compared with one: {rounds} rounds, {others}")
        return []
    one = comparable[-1]
    samples = ratios(row.ours.samples, one.ours.samples, more_is_better=True)
    title = f"{row.work}: k2 on two against k2 on one"
    return [Row(row.model, OVERLAP, title, row.unit, row.ours, one.ours, samples, target=_TARGET)]
