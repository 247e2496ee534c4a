"""The memory of latent attention to a prompt as k2 computes it: absorbed, or in blocks.

``sharding.latent_ways`` chooses the way of a step from its shapes. A plan needs room for the way
that takes most of all steps of up to a chunk, with a context of up to the planned one: mlx-lm's own
(``memory/prefill.py``) for a chunk with more queries than are absorbed, unless the plan has blocks.
"""

from __future__ import annotations

from dataclasses import dataclass

from k2cli.choices import Device
from k2cli.sharding.latent_ways import (
    LatentSettings,
    LatentWidths,
    is_absorbed,
    most_absorbed_queries,
)

_FLOAT32_BYTES = 4


@dataclass(frozen=True, slots=True)
class LatentArrays:
    """Sizes of one rank's latent attention: its heads, and the widths of a head."""

    heads: int
    rope: int
    widths: LatentWidths


@dataclass(frozen=True, slots=True)
class _Copies:
    """Copies of each array at the peak of a block.

    ``scores`` of heads, queries and tokens of the block; ``keys`` of the block's keys and values;
    ``rows`` of queries in the model's float type and of outputs in float32. ``beside`` is the part
    of the feed-forward arrays that is there as well; without one, they are added in full.
    """

    scores: float
    keys: float
    rows: float
    beside: float | None = None


# ``cpu`` and ``cuda`` are fitted (``benchmarks.activation_grid`` and ``benchmarks.mla_attention``).
# Metal is not measured: arrays from k2's code, and for blocks two of them, since a GPU gets one
# block ahead.
_ABSORBED: dict[Device, _Copies] = {
    "cpu": _Copies(1.9, 1.1, 3.5, 0.3),
    "cuda": _Copies(2.05, 1.25, 4.0),
    "metal": _Copies(2.0, 1.0, 4.0),
}
_BLOCKS: dict[Device, _Copies] = {
    "cpu": _Copies(1.75, 1.5, 2.6, 0.3),
    "cuda": _Copies(4.0, 3.0, 9.5, 0.0),
    "metal": _Copies(4.0, 3.0, 4.0),
}


def own_attention_bytes(
    arrays: LatentArrays,
    settings: LatentSettings,
    *,
    device: Device,
    chunk: int,
    context: int,
    itemsize: int,
    feed_forward_bytes: int,
    hidden_bytes: int,
) -> int:
    """Model the attention of all steps of up to ``chunk`` tokens that k2 computes itself.

    Returns:
        Bytes at the peak in addition to those of the feed-forward part and the hidden states.
    """
    most = most_absorbed_queries(arrays.widths, settings.expansion_weight, chunk, context)
    steps = [(_ABSORBED[device], _absorbed_arrays(arrays, settings, most, context))]
    if settings.block_tokens:
        steps.append((_BLOCKS[device], _block_arrays(arrays, settings, chunk, context)))
    peak = 0
    for copies, step in steps:
        here = (
            copies.scores * step.scores * itemsize
            + copies.keys * step.keys * itemsize
            + copies.rows * (step.queries * itemsize + step.outputs * _FLOAT32_BYTES)
        )
        if copies.beside is not None:
            here -= (1 - copies.beside) * feed_forward_bytes + hidden_bytes
        peak = max(peak, int(here))
    return peak


@dataclass(frozen=True, slots=True)
class _StepArrays:
    """Elements of the arrays of a step's attention to one block."""

    scores: int
    keys: int
    queries: int
    outputs: int


def _absorbed_arrays(
    arrays: LatentArrays, settings: LatentSettings, queries: int, context: int
) -> _StepArrays:
    if not queries:
        return _StepArrays(0, 0, 0, 0)
    rows = arrays.heads * queries
    length = min(settings.block_length(absorbed=True) or context, context)
    width = arrays.widths.latent + arrays.rope
    return _StepArrays(rows * length, length * width, rows * width, rows * arrays.widths.latent)


def _block_arrays(
    arrays: LatentArrays, settings: LatentSettings, queries: int, context: int
) -> _StepArrays:
    rows = arrays.heads * queries
    length = min(settings.block_tokens, context)
    keys = arrays.heads * length * (arrays.widths.expanded + arrays.rope)
    # The expanded width is that of a key without position and a value, which are as wide.
    value = arrays.widths.expanded // 2
    return _StepArrays(rows * length, keys, rows * (value + arrays.rope), rows * value)


def expanded_context(
    widths: LatentWidths, settings: LatentSettings, chunk: int, context: int
) -> int:
    """Return the longest context, up to ``context``, with which a chunk is computed mlx-lm's way.

    It is 0 if every chunk is computed in blocks.
    """
    if settings.block_tokens:
        return 0
    if not is_absorbed(widths, settings.expansion_weight, chunk, context):
        return context
    low, high = 0, context
    while low < high - 1:
        middle = (low + high) // 2
        if is_absorbed(widths, settings.expansion_weight, chunk, middle):
            high = middle
        else:
            low = middle
    return low
