"""How much memory computing takes beside weights and KV cache: modelled, per back end.

The peak is in prefill. Two things decide it: what attention materialises per chunk of the prompt
and token of context, and what the feed-forward part makes of a chunk.

*Latent attention* (MLA; DeepSeek-V3, Kimi K2) in mlx-lm makes scores ``[heads, chunk, context]``,
a masked copy of them, and expands keys and values from the latent, on every back end:
``2·heads·chunk·itemsize + 2·heads·(nope + v)·itemsize`` bytes per token of context. Measured: one
full-width K2 layer on the CPU, chunk 2048, context 8192: 4.821 GB against 4.83; DeepSeek-V3 on
Metal 1.2526 MB per token against 1.2499 (mlx-lm PR 839).

*Ordinary attention* is fused on Metal and CUDA for the head sizes that their kernels have; where
it is not (always on the CPU), scores and a mask are materialised, once.

Parts are added up, not maximised over: mlx frees an array when its last user has run, and keeps
several operations in flight. Measured on the CPU with small models of both kinds: 0.79 to 1.06 of
what is modelled here and the copy of one layer's cache that ``memory.overhead_bytes`` counts
(tests/planning/test_activation.py measures again).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil
from typing import Any

from k2cli.planning.config_check import first_field, heads_field, text_config, width_field
from k2cli.planning.hardware import Backend

PREFILL_CHUNKS = (2048, 1024, 512, 256, 128, 64, 32)
"""Tokens of a prompt that one step computes, largest first; the first is mlx-lm's own default."""

_FUSED_HEAD_SIZES = frozenset({64, 80, 128})
_FLOAT32_BYTES = 4


@dataclass(frozen=True, slots=True)
class ActivationShape:
    """The widths that decide activation memory, of the whole model.

    ``latent`` says that attention is MLA; ``expanded_size`` is then the width of one head's
    expanded key and value together. ``experts`` is 0 for a dense model.
    """

    hidden: int
    heads: int
    head_size: int
    vocabulary: int
    intermediate: int
    expert_intermediate: int = 0
    experts: int = 0
    experts_per_token: int = 0
    latent: bool = False
    expanded_size: int = 0


@dataclass(frozen=True, slots=True)
class ActivationDemand:
    """Bytes at the peak of prefill on one rank, by cause."""

    attention_bytes: int
    feed_forward_bytes: int
    hidden_bytes: int
    logits_bytes: int

    @property
    def peak_bytes(self) -> int:
        """All of it: see the module's text on why not the largest."""
        parts = (
            self.attention_bytes, self.feed_forward_bytes, self.hidden_bytes, self.logits_bytes
        )  # fmt: skip
        return sum(parts)


def activation_shape(config: Mapping[str, Any]) -> ActivationShape:
    """Read the widths from a checked config."""
    text = text_config(config)
    hidden = width_field(config) or 1
    heads = heads_field(config) or max(1, hidden // 128)
    experts = first_field(text, ("n_routed_experts", "num_experts", "num_local_experts")) or 0
    latent = text.get("kv_lora_rank") is not None
    intermediate = first_field(text, ("intermediate_size", "n_inner")) or 4 * hidden
    nope = first_field(text, ("qk_nope_head_dim",)) or 0
    value = first_field(text, ("v_head_dim",)) or 0
    return ActivationShape(
        hidden=hidden,
        heads=heads,
        head_size=first_field(text, ("head_dim",)) or max(1, hidden // heads),
        vocabulary=first_field(text, ("vocab_size",)) or 1,
        intermediate=intermediate,
        expert_intermediate=first_field(text, ("moe_intermediate_size",)) or intermediate,
        experts=experts,
        experts_per_token=first_field(text, ("num_experts_per_tok",)) or 1,
        latent=latent,
        expanded_size=nope + value,
    )


def activation_demand(
    shape: ActivationShape,
    *,
    backend: Backend,
    chunk_tokens: int,
    context_length: int,
    concurrency: int,
    itemsize: int,
    slices: int = 1,
    samples: bool = True,
) -> ActivationDemand:
    """Model one rank's peak while it prefills the last chunk of a full context.

    Args:
        chunk_tokens: tokens of the prompt per step; one prompt is prefilled at a time.
        context_length: tokens in the cache at the end, per sequence.
        concurrency: sequences that decode together.
        itemsize: bytes per element of activations and cache.
        slices: ranks that share each layer (tensor parallelism); 1 otherwise.
        samples: whether this rank computes logits.
    """
    chunk = min(chunk_tokens, context_length)
    heads = ceil(shape.heads / slices)
    return ActivationDemand(
        _attention_bytes(shape, backend, heads, chunk, context_length, itemsize),
        _feed_forward_bytes(shape, chunk, itemsize, slices),
        4 * chunk * shape.hidden * itemsize,
        _logits_bytes(shape, concurrency, itemsize) if samples else 0,
    )


def decode_demand(
    shape: ActivationShape,
    *,
    backend: Backend,
    context_length: int,
    concurrency: int,
    itemsize: int,
    slices: int = 1,
    samples: bool = True,
) -> ActivationDemand:
    """Model one rank's peak while all sequences decode one token at a full context.

    Latent attention stays in the latent space for a single token: it makes scores and a masked
    copy of them, and expands nothing. Arguments are those of ``activation_demand``.
    """
    heads = ceil(shape.heads / slices)
    rows = concurrency
    scores = heads * rows * context_length * itemsize
    if shape.latent:
        attention = 2 * scores
    else:
        fused = backend != "cpu" and shape.head_size in _FUSED_HEAD_SIZES
        attention = 4 * rows * heads * shape.head_size * itemsize + (0 if fused else scores)
    return ActivationDemand(
        attention,
        _feed_forward_bytes(shape, rows, itemsize, slices),
        4 * rows * shape.hidden * itemsize,
        _logits_bytes(shape, concurrency, itemsize) if samples else 0,
    )


def _attention_bytes(
    shape: ActivationShape, backend: Backend, heads: int, chunk: int, context: int, itemsize: int
) -> int:
    scores = heads * chunk * context * itemsize
    if shape.latent:
        expanded = heads * shape.expanded_size * context * itemsize
        return 2 * (scores + expanded)
    projections = 4 * chunk * heads * shape.head_size * itemsize
    if backend != "cpu" and shape.head_size in _FUSED_HEAD_SIZES:
        return projections
    mask = chunk * context
    return scores + mask + projections


def _feed_forward_bytes(shape: ActivationShape, chunk: int, itemsize: int, slices: int) -> int:
    dense = chunk * 3 * ceil(shape.intermediate / slices) * itemsize
    if not shape.experts:
        return dense
    # Tokens are gathered once per chosen expert, and put back in order; the router scores all
    # experts in float32.
    rows = chunk * shape.experts_per_token
    chosen = rows * (3 * ceil(shape.expert_intermediate / slices) + 3 * shape.hidden) * itemsize
    return max(dense, chosen + 3 * chunk * shape.experts * _FLOAT32_BYTES)


def _logits_bytes(shape: ActivationShape, concurrency: int, itemsize: int) -> int:
    """One row per sequence, since k2 samples after a step of one token, and two float32 copies."""
    return shape.vocabulary * concurrency * (itemsize + 2 * _FLOAT32_BYTES)
