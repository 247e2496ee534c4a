"""Ranges found from the graph, compared with the arrays that result."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from k2cli.choices import HeadPlacement
from k2cli.sharding.placement import Placement, RankPlacement
from k2cli.sharding.slices import AxisSlice, part_slices, trace_slices
from k2cli.sharding.tensor import StandInGroup
from k2cli.sharding.trace import parameters, trace_model, trace_rank
from tests.support.memory import held_bytes

CONFIGS = Path(__file__).parents[1] / "data" / "configs"
WHOLE = np.arange(12 * 10 * 6).reshape(12, 10, 6)


def _follow_one(change: Callable[[mx.array], mx.array]) -> AxisSlice | None:
    return trace_slices(lambda arrays: {"y": change(arrays["x"])}, {"x": mx.array(WHOLE)}).get("y")


def _taken(part: AxisSlice) -> Any:
    indices = [index for first, past_last in part.runs for index in range(first, past_last)]
    return np.take(WHOLE, indices, part.axis)


def _fused(x: mx.array) -> mx.array:
    """Take the second half of each of three unequal segments, as mlx cuts a fused projection."""
    pieces = [mx.split(segment, 2, axis=0)[1] for segment in mx.split(x, [4, 10], axis=0)]
    return mx.contiguous(mx.concatenate(pieces, axis=0))


@pytest.mark.parametrize(
    ("change", "axis", "runs"),
    [
        (lambda x: x, 0, ((0, 12),)),
        (lambda x: mx.contiguous(mx.split(x, 3, axis=0)[1]), 0, ((4, 8),)),
        (lambda x: mx.split(x, 2, axis=-1)[1], 2, ((3, 6),)),
        (lambda x: x[3:9][1:-1], 0, ((4, 8),)),
        (lambda x: x[:, -4:], 1, ((6, 10),)),
        (lambda x: x[:, 2:][:, 3:99], 1, ((5, 10),)),
        (_fused, 0, ((2, 4), (7, 10), (11, 12))),
        (lambda x: _fused(x)[1:4], 0, ((3, 4), (7, 9))),
        (lambda x: mx.concatenate([x[:, 2:4], x[:, 4:7]], axis=1), 1, ((2, 7),)),
        (lambda x: mx.concatenate([x[8:], x], axis=0), 0, ((8, 12), (0, 12))),
    ],
)
def test_selections_along_one_axis_are_found(
    change: Callable[[mx.array], mx.array], axis: int, runs: tuple[tuple[int, int], ...]
) -> None:
    part = _follow_one(change)
    assert part == AxisSlice("x", WHOLE.shape, axis, runs)
    assert part.result_shape == tuple(change(mx.array(WHOLE)).shape)
    np.testing.assert_array_equal(_taken(part), np.array(change(mx.array(WHOLE))))


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x[::2],
        lambda x: x[:6, :, :3],
        lambda x: mx.repeat(x, 2, axis=0),
        lambda x: x[:6] / 2,
        lambda x: x.reshape(12, 60)[:6],
        lambda x: x[0],
        lambda x: mx.concatenate([x[:6], x[:6] + 1], axis=0),
        lambda x: mx.concatenate([x[:, :5], x[:, 5:]], axis=0),
        lambda x: mx.zeros(x.shape),
    ],
)
def test_whatever_is_more_than_that_is_left_out(change: Callable[[mx.array], mx.array]) -> None:
    assert _follow_one(change) is None


def test_what_cannot_be_exported_makes_everything_unknown_and_errors_pass() -> None:
    def sort_of(arrays: dict[str, mx.array]) -> dict[str, mx.array]:
        return {"y": mx.view(mx.hadamard_transform(arrays["x"].astype(mx.float32)), mx.uint32)}

    assert trace_slices(sort_of, {"x": mx.zeros((4, 4))}).get("y") is None

    def uneven(arrays: dict[str, mx.array]) -> dict[str, mx.array]:
        return {"y": mx.split(arrays["x"], 3, axis=0)[0]}

    with pytest.raises(ValueError, match="split"):
        trace_slices(uneven, {"x": mx.zeros((4, 4))})


@pytest.mark.parametrize("head", ["replicated", "sharded"])
@pytest.mark.parametrize("size", [2, 4])
def test_all_of_k2_is_found_without_allocating_any_of_it(size: int, head: HeadPlacement) -> None:
    config: dict[str, Any] = json.loads((CONFIGS / "k2-mlx-4bit" / "config.json").read_text())
    parts = tuple(RankPlacement(rank, f"n{rank}", (0, 61)) for rank in range(size))
    placement = Placement("tensor", parts, head)
    before = held_bytes()
    ranks = [
        part_slices(config, trace_model(config), placement, StandInGroup(rank, size))
        for rank in range(size)
    ]
    expected = parameters(trace_rank(config, placement, 0).model)
    assert mx.get_peak_memory() - before < 1_000_000
    for name, array in expected.items():
        slices = [rank[name] for rank in ranks]
        assert all(part.result_shape == tuple(array.shape) for part in slices)
        runs = sorted({run for part in slices for run in part.runs})
        # Every rank the whole, or together each element once.
        assert [run[0] for run in runs] == [0, *(run[1] for run in runs[:-1])]
        assert runs[-1][1] == slices[0].shape[slices[0].axis]
