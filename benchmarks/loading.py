"""Measure the cost of loading for each rank: bytes read of the checkpoint, and peak memory."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.comparison import say
from benchmarks.k2_sides import K2Engine
from benchmarks.mlx_sides import MlxServer
from benchmarks.report import Row
from benchmarks.sides import RankFacts, Setting
from benchmarks.statistics import ratios, summary


def loading_rows(title: str, placement: str, setting: Setting) -> list[Row]:
    """Start each program once and look at its ranks. Samples are ranks, not rounds."""
    say(f"{title}, {placement}: loading")
    own = _own_bytes(setting)
    ours, theirs = _facts(K2Engine(setting)), _facts(MlxServer(setting))
    return [
        _row(
            title,
            placement,
            "bytes read by a rank / its own part",
            "x",
            [fact.bytes_read / part for fact, part in zip(ours, own, strict=True)],
            [fact.bytes_read / part for fact, part in zip(theirs, own, strict=True)],
        ),
        _row(
            title,
            placement,
            "peak memory of a rank, less the bare program's / its own part",
            "x",
            [fact.peak_resident_bytes / part for fact, part in zip(ours, own, strict=True)],
            [fact.peak_resident_bytes / part for fact, part in zip(theirs, own, strict=True)],
        ),
    ]


def _facts(side: K2Engine | MlxServer) -> list[RankFacts]:
    try:
        side.start()
        return side.facts()
    finally:
        side.close()


def _own_bytes(setting: Setting) -> list[int]:
    from tests.support.rank_pool import assignments

    parts = assignments(setting.model, setting.strategy, setting.ranks)
    return list(parts[0].expected_weights_bytes)


def _row(
    title: str,
    placement: str,
    work: str,
    unit: str,
    ours: Sequence[float],
    theirs: Sequence[float],
) -> Row:
    ratio = ratios(ours, theirs, more_is_better=False)
    return Row(title, placement, work, unit, summary(ours), summary(theirs), ratio)
