"""The memory of prefill beside weights and KV cache: modelled, per device.

Decode takes less and is in ``memory/decode.py``. Two things decide: what attention materializes per
token of the chunk and token of context, and the arrays of the feed-forward part for a chunk. At its
peak a device holds as many copies of each array as ``COPIES`` says, fitted to MLX's own peaks over
a grid of chunks and contexts (docs/design/memory-model.md shows every point;
``scripts/memory-model`` writes it). The parts are added up: mlx frees an array when its last user
has run, and keeps several operations in flight.

*Latent attention* (MLA; DeepSeek-V3, Kimi K2) in mlx-lm makes scores ``[heads, chunk, context]``
with a masked copy, and expands keys and values from the latent. If that projection is quantized,
the CPU and CUDA first copy the latent for every head, for keys and for values. Metal does not:
DeepSeek-V3 took 1.2526 MB per token of context there (mlx-lm PR 839); two copies of scores and of
the expanded pair are 1.2499. What k2 computes itself, absorbed or in blocks, is in
``memory/latent.py``.

*Joined projections* (gate and up as one product) leave their result in memory while its halves are
multiplied; MLX otherwise overwrites one of them (``JOINED_COPIES``).

*Ordinary attention* is fused on Metal and CUDA for the head sizes that their kernels support.
Otherwise (always on the CPU, and for float32 on CUDA) scores and a mask are materialized, once.

A cache grows by copying one layer at a time, before a step: the peak is the larger of the step and
that copy (``ledger.overhead_bytes``), not their sum.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import ceil
from typing import TYPE_CHECKING, Any

from k2cli.choices import Device
from k2cli.planning.config_check import first_field, heads_field, text_config, width_field
from k2cli.planning.memory.latent import LatentArrays, expanded_context, own_attention_bytes
from k2cli.planning.memory.recurrent import recurrent_prefill
from k2cli.planning.memory.recurrent_cuda import cuda_prefill_bytes
from k2cli.sharding.latent_ways import LatentSettings, LatentWidths

if TYPE_CHECKING:
    import mlx.nn as nn

    from k2cli.sharding.recurrence import Recurrence

PREFILL_CHUNKS = (2048, 1024, 512, 256, 128, 64, 32)
"""Tokens of a prompt that one step computes, largest first; the first is mlx-lm's own default."""

_FUSED_HEAD_SIZES = frozenset({64, 80, 128})
_FLOAT32_BYTES = 4
# Part of attention's arrays that is there while the recurrence of the same layer is computed.
_SCORES_IN_PARALLEL = 0.85
_PAGE_BYTES = 16384


@dataclass(frozen=True, slots=True)
class Copies:
    """Copies of each array of a layer that exist at the peak of prefill, on one device.

    ``latent`` is the latent copied for every head if its projection is quantized. ``hidden`` and
    ``inner`` are arrays of the model's and the feed-forward part's width, per token of the chunk;
    ``expert_hidden`` and ``expert_inner`` the same per chosen expert.
    """

    scores: float
    expanded: float
    latent: float
    hidden: float
    inner: float
    expert_hidden: float
    expert_inner: float


COPIES: dict[str, dict[str, Copies]] = {
    "latent": {
        "cpu": Copies(2.04, 1.0, 2.0, 7.5, 0.0, 3.8, 1.5),
        "cuda": Copies(0.97, 1.0, 2.0, 0.0, 0.0, 8.2, 0.0),
        # Not measured: arrays from mlx-lm's code, and the CPU's figures for the feed-forward part.
        "metal": Copies(2.0, 2.0, 0.0, 7.5, 0.0, 3.8, 1.5),
    },
    "grouped": {
        "cpu": Copies(1.03, 0.0, 0.0, 13.2, 2.0, 3.8, 1.5),
        "cuda": Copies(1.03, 0.0, 0.0, 5.5, 3.0, 3.4, 3.0),
        "metal": Copies(1.03, 0.0, 0.0, 13.2, 2.0, 3.8, 1.5),
    },
}
"""Copies by kind of attention and device: ``cpu`` and ``cuda`` fitted, ``metal`` modelled."""


JOINED_COPIES = {"experts": 1.3, "dense": 1.05}
"""Copies of ``expert_inner`` or ``inner`` that joined projections add (fitted on the CPU; on a GPU
as well, which is not measured)."""


@dataclass(frozen=True, slots=True)
class ActivationShape:
    """The widths of the whole model that decide activation memory.

    ``latent_size`` is the width of MLA's latent, 0 for other attention; ``expanded_size`` is then
    the width of one head's expanded key and value together, and ``rope_size`` that of a key's part
    with the position. ``own_attention`` is true if k2 computes it itself where that takes less.
    ``experts`` is 0 for a dense model. ``joins`` is true if gate and up projections can be joined,
    those of experts if there are any.
    ``attends`` is false if no layer has keys and values. ``recurrence`` describes the recurrent
    layers, if there are any; the peak is that of the kind of layer that takes most.
    """

    hidden: int
    heads: int
    head_size: int
    vocabulary: int
    intermediate: int
    expert_intermediate: int = 0
    experts: int = 0
    experts_per_token: int = 0
    latent_size: int = 0
    expanded_size: int = 0
    rope_size: int = 0
    own_attention: bool = False
    joins: bool = False
    quantized: bool = False
    attends: bool = True
    recurrence: Recurrence | None = None

    def recurrent_layers(self, layers: int | None) -> int:
        """Return how many of a rank's layers are recurrent, at most; of all of them if None."""
        if self.recurrence is None:
            return 0
        return self.recurrence.layers if layers is None else min(layers, self.recurrence.layers)


@dataclass(frozen=True, slots=True)
class ActivationBytes:
    """Bytes at the peak of a step of prefill or decode on one rank, by cause.

    ``recurrent_bytes`` is what recurrent layers take in addition to the other parts: what they
    leave in memory, and how much more one of them needs than a layer with attention.
    """

    attention_bytes: int
    feed_forward_bytes: int
    hidden_bytes: int
    logits_bytes: int
    recurrent_bytes: int = 0

    @property
    def peak_bytes(self) -> int:
        """The sum of all parts; the module's docstring gives the reason."""
        parts = (
            self.attention_bytes, self.feed_forward_bytes, self.hidden_bytes, self.logits_bytes,
            self.recurrent_bytes,
        )  # fmt: skip
        return sum(parts)


def activation_shape(config: Mapping[str, Any]) -> ActivationShape:
    """Read the widths from a checked config."""
    text = text_config(config)
    hidden = width_field(config) or 1
    heads = heads_field(config) or max(1, hidden // 128)
    experts = first_field(text, ("n_routed_experts", "num_experts", "num_local_experts")) or 0
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
        latent_size=first_field(text, ("kv_lora_rank",)) or 0,
        expanded_size=nope + value,
        rope_size=first_field(text, ("qk_rope_head_dim",)) or 0,
        quantized=any(part.get("quantization") is not None for part in (config, text)),
    )


def shape_of_model(config: Mapping[str, Any], model: nn.Module) -> ActivationShape:
    """Read the widths from a checked config, and the kinds of layers from its traced model."""
    from k2cli.sharding.joined_pairs import projection_pairs
    from k2cli.sharding.latent_ways import has_own_attention
    from k2cli.sharding.recurrence import recurrence_of

    recurrence, attends = recurrence_of(model)
    shape = activation_shape(config)
    joins = any(pair.is_of_experts == (shape.experts > 0) for pair in projection_pairs(model))
    return replace(
        shape,
        recurrence=recurrence,
        attends=attends,
        own_attention=has_own_attention(model),
        joins=joins,
    )


def prefill_activation(
    shape: ActivationShape,
    *,
    device: Device,
    chunk_tokens: int,
    context_length: int,
    concurrency: int,
    itemsize: int,
    slices: int = 1,
    samples: bool = True,
    layers: int | None = None,
    settings: LatentSettings | None = None,
    joined: bool = False,
) -> ActivationBytes:
    """Model one rank's peak while it prefills the last chunk of a full context.

    Args:
        chunk_tokens: tokens of the prompt per step; one prompt is prefilled at a time.
        context_length: tokens in the cache at the end, per sequence.
        concurrency: sequences that decode together.
        itemsize: bytes per element of activations and cache.
        slices: ranks that share each layer (tensor parallelism); 1 otherwise.
        samples: whether this rank computes logits.
        layers: number of layers of this rank, all of them if None; it matters for recurrent ones.
        settings: of k2's own latent attention, and then the peak is that of all steps of up to a
            chunk; None for mlx-lm's class.
        joined: whether projections of the same input are joined, where they can be.
    """
    chunk = min(chunk_tokens, context_length)
    heads = ceil(shape.heads / slices)
    copies = COPIES["latent" if shape.latent_size else "grouped"][device]
    hidden = chunk * shape.hidden * itemsize
    if device == "cuda":
        hidden = allocated_bytes(hidden)
    arrays = LatentArrays(
        heads, shape.rope_size, LatentWidths(shape.expanded_size, shape.latent_size)
    )
    own = settings if shape.own_attention else None
    longest = context_length
    if own is not None:
        longest = expanded_context(arrays.widths, own, chunk, context_length)
    attention = (
        _attention_bytes(shape, device, copies, heads, chunk, longest, itemsize)
        if shape.attends
        else 0
    )
    feed_forward = feed_forward_bytes(shape, copies, chunk, itemsize, slices, joined=joined)
    hidden = int(_hidden_copies(shape, device, copies, itemsize) * hidden)
    if own is not None:
        of_k2 = own_attention_bytes(
            arrays, own, device=device, chunk=chunk, context=context_length, itemsize=itemsize,
            feed_forward_bytes=feed_forward, hidden_bytes=hidden,
        )  # fmt: skip
        attention = max(attention, of_k2)
    recurrent = 0
    if shape.recurrence is not None and device == "cuda":
        recurrent = cuda_prefill_bytes(
            shape.recurrence, chunk=chunk, itemsize=itemsize, layers=shape.recurrent_layers(layers)
        )
    elif shape.recurrence is not None:
        need = recurrent_prefill(
            shape.recurrence, device=device, chunk=chunk, itemsize=itemsize,
            layers=shape.recurrent_layers(layers),
        )  # fmt: skip
        others = attention + feed_forward + hidden
        beside = int(_SCORES_IN_PARALLEL * attention) if shape.recurrence.in_parallel else 0
        peaks = (
            need.layer_bytes + beside + need.left_bytes,
            need.left_before_attention_bytes
            + (attention + hidden // 2 if shape.recurrence.apart else others),
            others - attention + need.left_bytes,
        )
        recurrent = max(0, max(peaks) - others)
    return ActivationBytes(
        attention,
        feed_forward,
        hidden,
        logits_bytes(shape, concurrency, itemsize) if samples else 0,
        recurrent,
    )


def is_fused(shape: ActivationShape, device: Device, itemsize: int) -> bool:
    """True if the attention kernel never writes scores to memory."""
    if device == "cuda" and itemsize == _FLOAT32_BYTES:
        return False
    return device != "cpu" and shape.head_size in _FUSED_HEAD_SIZES


def _hidden_copies(shape: ActivationShape, device: Device, copies: Copies, itemsize: int) -> float:
    """Return the copies of the hidden state at the peak.

    When CUDA materializes attention scores, it first makes queries, keys and values contiguous.
    """
    laid_out = device == "cuda" and not shape.latent_size and not is_fused(shape, device, itemsize)
    return copies.hidden + (3 if laid_out else 0)


def allocated_bytes(size_bytes: int) -> int:
    """Round up as MLX's GPU allocators do: to whole pages, or below one to a power of two."""
    if size_bytes >= _PAGE_BYTES:
        return ceil(size_bytes / _PAGE_BYTES) * _PAGE_BYTES
    return 1 << max(0, size_bytes - 1).bit_length()


def _attention_bytes(
    shape: ActivationShape,
    device: Device,
    copies: Copies,
    heads: int,
    chunk: int,
    context: int,
    itemsize: int,
) -> int:
    scores = copies.scores * heads * chunk * context * itemsize
    if shape.latent_size:
        expanded = copies.expanded * heads * shape.expanded_size * context * itemsize
        latent = copies.latent * heads * shape.latent_size * context * itemsize
        return int(scores + expanded + (latent if shape.quantized else 0))
    if is_fused(shape, device, itemsize):
        return 0
    return int(scores)


def feed_forward_bytes(
    shape: ActivationShape,
    copies: Copies,
    chunk: int,
    itemsize: int,
    slices: int,
    *,
    joined: bool = False,
) -> int:
    more = JOINED_COPIES["experts" if shape.experts else "dense"] if joined and shape.joins else 0
    if not shape.experts:
        inner_copies = copies.inner + more
        return int(inner_copies * chunk * ceil(shape.intermediate / slices) * itemsize)
    # Tokens are gathered once per chosen expert, and later restored to their order.
    rows = chunk * shape.experts_per_token * itemsize
    inner = ceil(shape.expert_intermediate / slices)
    inner_copies = copies.expert_inner + more
    return int(rows * (copies.expert_hidden * shape.hidden + inner_copies * inner))


def logits_bytes(shape: ActivationShape, concurrency: int, itemsize: int) -> int:
    """Return the bytes of a row of logits per sequence, with two float32 copies."""
    return shape.vocabulary * concurrency * (itemsize + 2 * _FLOAT32_BYTES)
