"""Masks on the logits of a batch."""

from __future__ import annotations

import math
from typing import Any, cast

import mlx.core as mx
import pytest

from k2cli.protocol import Sampling
from k2cli.rank.engine.choice import forbid
from k2cli.rank.engine.sampling import Sampler

VOCABULARY = 45  # no whole number of words


def _bits(tokens: set[int], size: int) -> bytes:
    return sum(1 << token for token in tokens).to_bytes(size, "little")


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16])
@pytest.mark.parametrize("size", [4, 8, 12], ids=lambda size: f"masks of {size} bytes")
def test_each_row_keeps_what_its_mask_allows(dtype: mx.Dtype, size: int) -> None:
    allowed = {0, 7, 8, 31} | ({32, 44} if size > 4 else set()) | ({70} if size > 8 else set())
    logits = mx.random.normal((3, VOCABULARY)).astype(dtype)
    masked = forbid(logits, [None, _bits(allowed, size), bytes(size)])
    assert masked.dtype == dtype
    before, after = (cast(list[list[float]], array.tolist()) for array in (logits, masked))
    assert after[0] == before[0]
    for token in range(VOCABULARY):
        assert after[1][token] == (before[1][token] if token in allowed else -math.inf)
    assert set(after[2]) == {-math.inf}


def test_rows_without_masks_cost_nothing() -> None:
    logits = mx.zeros((2, VOCABULARY))
    assert forbid(logits, [None, None]) is logits


@pytest.mark.parametrize("temperature", [1e-45, 1e-40, 1e-38, 1e-6])
@pytest.mark.parametrize("limits", [{}, {"top_p": 0.9}, {"min_p": 0.1}, {"top_k": 2}])
def test_a_tiny_temperature_chooses_the_best_token(
    temperature: float, limits: dict[str, Any]
) -> None:
    sampler = Sampler(Sampling(temperature=temperature, seed=1, **limits), [1])
    logits = mx.array([-mx.inf, 25.0, 25.5, -40.0])
    assert [sampler.pick(logits).item() for _ in range(3)] == [2, 2, 2]
