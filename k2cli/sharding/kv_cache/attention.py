"""Attention of a few queries to quantized keys and values.

mlx-lm's own function repeats the keys and values for each query head that shares them. On a CPU
MLX copies them for it: measured with 16 query heads for a head of keys, 36 times the memory. Here
such query heads are rows of one product instead.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from k2cli.mlx_lm_package import mlx_lm_module
from k2cli.sharding.kv_cache.quantized import Parts


def quantized_attention(
    queries: mx.array,
    q_keys: Parts,
    q_values: Parts,
    scale: float,
    mask: mx.array | str | None,
    group_size: int = 64,
    bits: int = 8,
) -> mx.array:
    """Compute attention; the arguments are those of mlx-lm's function.

    Args:
        queries: ``[rows, heads, queries, width]``.
        mask: bool or added to scores, ``[..., queries, tokens]``; or ``causal``; or None.
    """
    rows, heads, count, width = queries.shape
    key_heads = q_keys[0].shape[1]
    shared = heads // key_heads
    folded = (queries * scale).reshape(rows, key_heads, shared * count, width)
    scores = mx.quantized_matmul(
        folded, *q_keys, transpose=True, group_size=group_size, bits=bits
    )  # fmt: skip
    tokens = scores.shape[-1]
    if mask is not None:
        if isinstance(mask, str):
            mask = mx.arange(tokens - count, tokens)[:, None] >= mx.arange(tokens)[None]
        scores = scores.reshape(rows, heads, count, tokens)
        if mask.dtype == mx.bool_:
            scores = mx.where(mask, scores, mx.finfo(scores.dtype).min)
        else:
            scores = scores + mask
        scores = scores.reshape(rows, key_heads, shared * count, tokens)
    scores = mx.softmax(scores, axis=-1, precise=True)
    output = mx.quantized_matmul(
        scores, *q_values, transpose=False, group_size=group_size, bits=bits
    )
    return output.reshape(rows, heads, count, -1)


def use_own_quantized_attention() -> None:
    """Let mlx-lm's models use this attention in this process."""
    base: Any = mlx_lm_module("models.base")
    base.quantized_scaled_dot_product_attention = quantized_attention
