"""Lookahead: its conditions, and equal tokens on every rank with and without it."""

from __future__ import annotations

from pathlib import Path

import pytest

from k2cli.rank.engine import lookahead
from k2cli.rank.engine.lookahead import CopyWatch, looks_ahead
from k2cli.units import GB
from tests.support.rank_pool import RankPool, assignments, running


@pytest.mark.parametrize(
    ("strategy", "nodes", "cores", "expected"),
    [
        ("single", ["a"], 1, True),
        ("pipeline", ["a", "a"], 1, True),
        ("tensor", ["a", "b"], 2, True),
        ("tensor", ["a", "b"], 1, False),
        ("tensor", ["a", "a"], 3, False),
        ("tensor", ["a", "a"], 4, True),
    ],
)
def test_tensor_slices_look_ahead_where_they_have_cores_to_spare(
    toy_k2: Path,
    monkeypatch: pytest.MonkeyPatch,
    strategy: str,
    nodes: list[str],
    cores: int,
    expected: bool,
) -> None:
    monkeypatch.setattr(lookahead, "usable_cores", lambda: cores)
    parts = assignments(toy_k2, strategy, len(nodes), nodes=nodes)
    assert looks_ahead(parts[0]) is expected


def test_a_gpu_that_copies_caches_for_a_step_ahead_gets_none_with_large_caches() -> None:
    watch = CopyWatch(limit_bytes=100 * GB)
    assert watch.allows(cache_bytes=40 * GB, active_bytes=50 * GB)  # room to find out
    watch.observe(cache_bytes=40 * GB, grown_bytes=41 * GB)
    assert not watch.allows(cache_bytes=40 * GB, active_bytes=50 * GB)
    assert not watch.allows(cache_bytes=1 * GB, active_bytes=50 * GB)
    assert watch.allows(cache_bytes=GB // 10, active_bytes=99 * GB)  # small enough to copy


def test_a_step_ahead_needs_room_for_a_copy_until_caches_were_seen_not_to_be_copied() -> None:
    watch = CopyWatch(limit_bytes=100 * GB)
    assert not watch.allows(cache_bytes=40 * GB, active_bytes=70 * GB)
    assert watch.allows(cache_bytes=20 * GB, active_bytes=70 * GB)
    watch.observe(cache_bytes=20 * GB, grown_bytes=GB)
    assert watch.allows(cache_bytes=40 * GB, active_bytes=70 * GB)
    assert not watch.allows(cache_bytes=41 * GB, active_bytes=70 * GB)


def test_the_cpu_is_not_watched() -> None:
    watch = CopyWatch(limit_bytes=0)
    watch.observe(cache_bytes=40 * GB, grown_bytes=41 * GB)
    assert not watch.watches
    assert watch.allows(cache_bytes=40 * GB, active_bytes=99 * GB)


@pytest.mark.ranks
@pytest.mark.parametrize("strategy", ["pipeline", "tensor"])
def test_tokens_and_digests_are_the_same_with_and_without(
    toy_k2: Path, tmp_path: Path, strategy: str
) -> None:
    """Compare runs of more steps than lie between two digests, with requests of unequal length."""
    answers = []
    for ahead in (True, False):
        parts = assignments(toy_k2, strategy, 2, looks_ahead=ahead, concurrency=2)
        with running(RankPool(parts, tmp_path)) as pool:
            alone = pool.generate([300, 301, 302, 303], 40)
            names = [pool.submit([310 + n, 311, 312], count) for n, count in ((0, 40), (1, 9))]
            answers.append([alone, *(pool.outcome(name).tokens for name in names)])
    assert answers[0] == answers[1]
