"""Latent attention of one token per sequence, in compiled parts: for GPUs that wait for processors.

The operations are those of mlx-lm's code. What depends on the token alone, before the cache, is
compiled, and so is what follows the attention. Between them shapes grow with the context, so that
nothing is compiled.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from k2cli.mlx_lm_package import mlx_lm_module
from k2cli.rank.kernels.feed_forward import MOST_ROWS, is_shared


class OneToken:
    """Computes one token per sequence for a layer of ``DeepseekV3Attention``."""

    def __init__(self, layer: Any) -> None:
        self._layer = layer
        self._before: Callable[[mx.array], tuple[mx.array, ...]] = mx.compile(self._project)
        self._after: Callable[[mx.array], mx.array] = mx.compile(self._join)
        self._attend = mlx_lm_module("models.base").scaled_dot_product_attention

    def __call__(self, x: mx.array, mask: mx.array | None, cache: Any | None) -> mx.array:
        """Compute attention of ``x`` ``[batch, 1, width]``, as mlx-lm's class does."""
        layer = self._layer
        queries, rotated_queries, latents, rotated = self._before(x)
        offset = 0 if cache is None else cache.offset
        rotated_queries = layer.rope(rotated_queries, offset)
        rotated = layer.rope(rotated, offset)
        if cache is not None:
            latents, rotated = cache.update_and_fetch(latents, rotated)
        scores = (rotated_queries * layer.scale) @ rotated.swapaxes(-1, -2)
        if mask is not None:
            lowest = mx.array(mx.finfo(scores.dtype).min, scores.dtype)
            scores = mx.where(mask, scores, lowest)
        output = self._attend(
            queries, latents, latents, cache=cache, scale=layer.scale, mask=scores
        )
        return self._after(output)

    def _project(self, x: mx.array) -> tuple[mx.array, ...]:
        """Return queries as latents and their part with positions, latents and keys' part."""
        layer = self._layer
        batch, count, _ = x.shape
        if layer.q_lora_rank is None:
            queries = layer.q_proj(x)
        else:
            queries = layer.q_b_proj(layer.q_a_layernorm(layer.q_a_proj(x)))
        queries = queries.reshape(batch, count, layer.num_heads, -1).swapaxes(1, 2)
        nope, rope = mx.split(queries, [layer.qk_nope_head_dim], axis=-1)
        latents, rotated = mx.split(layer.kv_a_proj_with_mqa(x), [layer.kv_lora_rank], axis=-1)
        latents = layer.kv_a_layernorm(latents)[:, None]
        return layer.embed_q(nope), rope, latents, rotated[:, None]

    def _join(self, output: mx.array) -> mx.array:
        """Return the layer's output of ``[batch, heads, 1, latent width]``."""
        layer = self._layer
        values = layer.unembed_out(output).swapaxes(1, 2)
        result: mx.array = layer.o_proj(values.reshape(*values.shape[:2], -1))
        return result


def compile_one_token(model: nn.Module) -> int:
    """Let latent attention compute one token per sequence in compiled parts; return the layers."""
    kind = mlx_lm_module("models.deepseek_v3").DeepseekV3Attention
    count = 0
    for module in model.modules():
        if isinstance(module, kind) and hasattr(module, "one_token") and not is_shared(module):
            module.one_token = OneToken(module)
            count += 1
    return count


def forget_one_token(model: nn.Module) -> None:
    """Let what is compiled be compiled again at its next call: what it calls has changed."""
    for module in model.modules():
        if isinstance(getattr(module, "one_token", None), OneToken):
            module.one_token = OneToken(module)


def is_one_token(x: mx.array) -> bool:
    """True if ``x`` ``[batch, queries, width]`` has one token of each of a few sequences."""
    batch, queries, _ = x.shape
    return queries == 1 and batch <= MOST_ROWS
