"""The search for a pipeline's split against trying all of them."""

from __future__ import annotations

from itertools import combinations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from k2cli.planning.search.best_split import best_split

Ranges = tuple[tuple[int, int], ...]


def all_splits(layers: int, stages: int) -> list[Ranges]:
    cuts = combinations(range(1, layers), stages - 1)
    return [tuple(zip((0, *cut), (*cut, layers), strict=True)) for cut in cuts]


@st.composite
def matrices(draw: st.DrawFn) -> list[np.ndarray]:
    """Costs of up to four stages over up to seven layers; some stages are impossible."""
    size = draw(st.integers(1, 7)) + 1
    cost = st.one_of(st.integers(-20, 20).map(float), st.just(np.inf))
    row = st.lists(cost, min_size=size, max_size=size)
    matrix = st.lists(row, min_size=size, max_size=size).map(np.array)
    return draw(st.lists(matrix, min_size=1, max_size=4))


@settings(deadline=None, database=None, max_examples=200)
@given(matrices())
def test_no_split_has_a_cheaper_costliest_stage(costs: list[np.ndarray]) -> None:
    layers = costs[0].shape[0] - 1
    finite = [np.where(np.isfinite(matrix), matrix, 0) for matrix in costs]
    preferences = [np.abs(matrix % 7) for matrix in finite]

    def costliest(ranges: Ranges) -> float:
        return max(float(cost[span]) for cost, span in zip(costs, ranges, strict=True))

    def preferred(ranges: Ranges) -> float:
        return sum(float(each[span]) for each, span in zip(preferences, ranges, strict=True))

    splits = all_splits(layers, len(costs))
    possible = [ranges for ranges in splits if np.isfinite(costliest(ranges))]
    found = best_split(costs, preferences)
    if not possible:
        assert found is None
        return
    assert found is not None
    cost, ranges = found
    assert ranges in splits
    assert cost == costliest(ranges) == min(map(costliest, possible))
    equals = [each for each in possible if costliest(each) == cost]
    assert preferred(ranges) == min(map(preferred, equals))
