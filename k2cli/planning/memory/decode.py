"""The memory of a decode step beside weights and KV cache: modelled, per device.

On the CPU, and as far as is known on Metal, arrays are freed as soon as their last user has run, so
the peak is that of one layer. On CUDA, MLX submits operations in graphs of up to 100 and keeps
their inputs until the GPU has finished the whole graph, with up to ten graphs in flight
(mlx/backend/cuda/device.cpp, mlx/transforms.cpp). If the GPU is behind the program, as with any
model worth planning, everything that a step makes is held until its end, and the peak is the sum
over layers. Two things are added there, both measured on an H100:

* a single sequence with latent attention multiplies all heads with one latent matrix, for which
  cuBLASLt takes a workspace that depends on the length (``_WORKSPACE``);
* rows of different lengths need a mask, which ordinary attention copies for every head.

docs/design/memory-model.md compares the model with MLX's measurements.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import pairwise
from math import ceil

from k2cli.choices import Device
from k2cli.planning.memory.prefill import (
    COPIES,
    ActivationBytes,
    ActivationShape,
    allocated_bytes,
    feed_forward_bytes,
    is_fused,
    logits_bytes,
)
from k2cli.planning.memory.recurrent import recurrent_decode_bytes
from k2cli.planning.memory.recurrent_cuda import cuda_decode_bytes
from k2cli.units import MIB

# The number of chosen experts from which mlx-lm sorts tokens by expert, in a copy.
_SORTED_FROM = 64
# Layers whose arrays ten graphs of 100 operations hold at most: a layer with latent attention
# has some 60 operations (six of K2's were held whole, 9.2 with two steps in flight), others 25.
HELD_LAYERS = {"latent": 16, "grouped": 40}
_WORKSPACE_HEADS = 64
_WORKSPACE = (
    (256, 1.03), (512, 2.03), (1024, 2.40), (2048, 4.00), (2049, 5.65), (4096, 8.15),
    (8192, 12.09), (12288, 8.14), (24576, 8.27), (131072, 8.27),
)  # fmt: skip
"""Tokens in the cache, and MiB of workspace per layer for 64 heads with a latent of 512 (odd
lengths, the largest): measured with cuBLASLt of CUDA 13 on an H100."""


@dataclass(frozen=True, slots=True)
class _LayerCopies:
    """Copies of each array of a layer that a decode step on CUDA makes, without the scores.

    ``expert_hidden`` is the output per chosen expert; ``latent`` is all heads' latent queries and
    outputs. Fitted to K2, Qwen3-MoE, Llama and SmolLM2 on an H100.
    """

    expert_hidden: int
    inner: int
    hidden: int
    queries: int
    latent: int


# DeepSeek-V3's router weights outputs in float32: two more copies.
_CUDA_COPIES = {
    "latent": _LayerCopies(expert_hidden=3, inner=2, hidden=4, queries=3, latent=3),
    "grouped": _LayerCopies(expert_hidden=1, inner=2, hidden=4, queries=3, latent=0),
}


def decode_activation(
    shape: ActivationShape,
    *,
    device: Device,
    context_length: int,
    concurrency: int,
    itemsize: int,
    slices: int = 1,
    samples: bool = True,
    layers: int = 1,
    joined: bool = False,
) -> ActivationBytes:
    """Model one rank's peak while all sequences decode one token, up to a full context.

    Args:
        context_length: tokens in the cache at the end, per sequence.
        concurrency: sequences that decode together.
        itemsize: bytes per element of activations and cache.
        slices: ranks that share each layer (tensor parallelism); 1 otherwise.
        samples: whether this rank computes logits.
        layers: number of layers of this rank; it matters on CUDA only.
        joined: whether projections of the same input are joined, where they can be.
    """
    heads = ceil(shape.heads / slices)
    logits = logits_bytes(shape, concurrency, itemsize) if samples else 0
    state = 0
    if shape.recurrence is not None:
        of_device = cuda_decode_bytes if device == "cuda" else recurrent_decode_bytes
        state = of_device(shape.recurrence, rows=concurrency, itemsize=itemsize)
    if device == "cuda":
        held = min(layers, HELD_LAYERS[_kind(shape)])
        attention, feed_forward, hidden = _cuda_layer(
            shape, heads, concurrency, context_length, itemsize, slices, joined=joined
        )
        recurrent = shape.recurrent_layers(layers) * state
        if not shape.attends:
            attention = 0
        return ActivationBytes(
            held * attention, held * feed_forward, held * hidden, logits, recurrent
        )
    scores = heads * concurrency * context_length * itemsize
    if shape.latent_size:
        # A single token stays in the latent space: scores and a masked copy, no expanded keys.
        attention = 2 * scores
    else:
        attention = 4 * concurrency * heads * shape.head_size * itemsize
        attention += 0 if is_fused(shape, device, itemsize) else scores
    if not shape.attends:
        attention = 0
    copies = COPIES[_kind(shape)][device]
    feed_forward = feed_forward_bytes(shape, copies, concurrency, itemsize, slices, joined=joined)
    hidden = 4 * concurrency * shape.hidden * itemsize
    beyond = max(0, state - attention - feed_forward - hidden)
    return ActivationBytes(attention, feed_forward, hidden, logits, beyond)


def _kind(shape: ActivationShape) -> str:
    return "latent" if shape.latent_size else "grouped"


def _cuda_layer(
    shape: ActivationShape,
    heads: int,
    rows: int,
    context: int,
    itemsize: int,
    slices: int,
    *,
    joined: bool,
) -> tuple[int, int, int]:
    """Compute the bytes of one layer's step on CUDA: attention, feed-forward part, hidden state."""
    copies = _CUDA_COPIES[_kind(shape)]
    if joined and shape.joins:  # the joined result is not overwritten
        copies = replace(copies, inner=copies.inner + 1)
    each = rows * itemsize
    if shape.latent_size:
        attention = copies.latent * allocated_bytes(each * heads * shape.latent_size)
        attention += copies.queries * allocated_bytes(each * heads * shape.expanded_size)
        attention += _largest_latent_scores(shape, heads, rows, context, itemsize)
    else:
        attention = copies.queries * allocated_bytes(each * heads * shape.head_size)
        attention += _grouped_scores(shape, heads, rows, context, itemsize)
    return attention, _cuda_feed_forward(shape, copies, rows, itemsize, slices), (
        copies.hidden * allocated_bytes(each * shape.hidden)
    )  # fmt: skip


def _cuda_feed_forward(
    shape: ActivationShape, copies: _LayerCopies, rows: int, itemsize: int, slices: int
) -> int:
    if not shape.experts:
        return copies.inner * allocated_bytes(rows * ceil(shape.intermediate / slices) * itemsize)
    chosen = rows * shape.experts_per_token
    outputs = copies.expert_hidden + (2 if chosen >= _SORTED_FROM else 0)
    inner = ceil(shape.expert_intermediate / slices)
    return outputs * allocated_bytes(
        chosen * shape.hidden * itemsize
    ) + copies.inner * allocated_bytes(chosen * inner * itemsize)


def _largest_latent_scores(
    shape: ActivationShape, heads: int, rows: int, context: int, itemsize: int
) -> int:
    """Return the most bytes of scores, masked copy and workspace up to a full context."""

    def at(tokens: int) -> int:
        scores = 2 * heads * rows * tokens * itemsize
        if rows > 1:
            return scores
        share = heads * shape.latent_size / (_WORKSPACE_HEADS * 512)
        return scores + int(share * _between(_WORKSPACE, tokens) * MIB)

    passed = [tokens for tokens, _ in _WORKSPACE if tokens < context]
    return max(at(tokens) for tokens in [*passed, context])


def _grouped_scores(
    shape: ActivationShape, heads: int, rows: int, context: int, itemsize: int
) -> int:
    scores = heads * rows * context * itemsize
    if not is_fused(shape, "cuda", 2):  # a single query's kernel takes float32, too
        return 2 * scores
    if rows > 1:
        return scores  # the mask, copied for every head
    # Long keys are divided into blocks, each with a partial sum in float32.
    if context < 1024:
        return 0
    blocks = 32 if itemsize == 4 else 16 if context <= 4096 else 64
    return allocated_bytes(blocks * heads * shape.head_size * 4)


def _between(table: Iterable[tuple[int, float]], at: int) -> float:
    """Interpolate linearly between the points of a table."""
    points = list(table)
    if at <= points[0][0]:
        return points[0][1] * at / points[0][0]
    for (x0, y0), (x1, y1) in pairwise(points):
        if at <= x1:
            return y0 + (y1 - y0) * (at - x0) / (x1 - x0)
    return points[-1][1]
