"""What k2's CUDA kernels compute, in plain operations: for a CPU, and as the expected value."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn


def chosen_product(
    x: mx.array,
    chosen: mx.array,
    parts: Sequence[Mapping[str, mx.array]],
    settings: Mapping[str, Any],
    *,
    gated: bool = False,
    factors: mx.array | None = None,
) -> mx.array:
    """See ``k2cli.rank.kernels.chosen_product``; in float32 until the end."""
    weights = mx.concatenate([_dequantized(part, settings) for part in parts], axis=1)
    rows, choices = chosen.shape
    if x.shape[0] == rows:
        x = mx.repeat(x, choices, axis=0)
    own = weights[chosen.reshape(-1), :, : x.shape[1]]
    product = (own @ x.astype(mx.float32)[:, :, None])[:, :, 0]
    if gated:
        gate, up = mx.split(product, 2, axis=-1)
        product = nn.silu(gate) * up
    if factors is not None:
        product = (product.reshape(rows, choices, -1) * factors[:, :, None]).sum(axis=1)
    return product.astype(x.dtype)


def shared_product(x: mx.array, arrays: Mapping[str, mx.array], group_size: int) -> mx.array:
    """See ``k2cli.rank.kernels.shared_product``."""
    weight = _dequantized(arrays, {"group_size": group_size, "bits": 4})
    return (x.astype(mx.float32) @ weight.T).astype(x.dtype)


def chosen_experts(
    logits: mx.array, correction: mx.array, *, choices: int, normalised: bool, scale: float
) -> tuple[mx.array, mx.array]:
    """See ``k2cli.rank.kernels.expert_choice``."""
    weights = mx.sigmoid(logits.astype(mx.float32))
    order = mx.argsort(-(weights + correction), axis=-1)[:, :choices]
    found = mx.take_along_axis(weights, order, axis=-1)
    if normalised:
        found = found / found.sum(axis=-1, keepdims=True)
    return order.astype(mx.uint32), found * scale


def _dequantized(arrays: Mapping[str, mx.array], settings: Mapping[str, Any]) -> mx.array:
    return mx.dequantize(
        arrays["weight"],
        arrays["scales"].astype(mx.float32),
        arrays["biases"].astype(mx.float32),
        group_size=settings["group_size"],
        bits=settings["bits"],
    )
