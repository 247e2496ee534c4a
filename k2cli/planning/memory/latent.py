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

    @property
    def query(self) -> int:
        """Width of a query in the latent space."""
        return self.widths.latent + self.rope


@dataclass(frozen=True, slots=True)
class _Copies:
    """Copies of each array at the peak of a block.

    ``scores`` of heads, queries and tokens of the block; ``queries`` (absorbed) of heads, queries
    and latent; ``keys`` of the block's own keys and values; ``outputs`` in float32, per query.
    """

    scores: float
    queries: float
    keys: float
    outputs: float


_ABSORBED: dict[Device, _Copies] = {
    "cpu": _Copies(2.0, 2.0, 1.0, 1.0),
    "cuda": _Copies(2.0, 2.0, 1.0, 1.0),
    "metal": _Copies(2.0, 2.0, 1.0, 1.0),
}
_BLOCKS: dict[Device, _Copies] = {
    "cpu": _Copies(2.0, 2.0, 1.0, 1.0),
    "cuda": _Copies(2.0, 2.0, 1.0, 1.0),
    "metal": _Copies(2.0, 2.0, 1.0, 1.0),
}


@dataclass(frozen=True, slots=True)
class OwnWays:
    """Peak of the ways that k2 computes itself, and the largest context of mlx-lm's own way.

    ``expanded_context`` is 0 if no chunk of the planned size is computed mlx-lm's way.
    """

    peak_bytes: int
    expanded_context: int


def own_ways(
    arrays: LatentArrays,
    settings: LatentSettings,
    *,
    device: Device,
    chunk: int,
    context: int,
    itemsize: int,
) -> OwnWays:
    """Model the attention of all steps of up to ``chunk`` tokens, up to ``context`` tokens."""
    peaks = [0]
    weight = settings.expansion_weight
    if most := most_absorbed_queries(arrays.widths, weight, chunk, context):
        length = min(settings.block_length(absorbed=True) or context, context)
        peaks.append(_absorbed_bytes(arrays, _ABSORBED[device], most, length, itemsize))
    if settings.block_tokens:
        length = min(settings.block_tokens, context)
        peaks.append(_block_bytes(arrays, _BLOCKS[device], chunk, length, itemsize))
        return OwnWays(max(peaks), 0)
    return OwnWays(max(peaks), _expanded_context(arrays.widths, weight, chunk, context))


def _expanded_context(widths: LatentWidths, weight: float, chunk: int, context: int) -> int:
    """Return the longest context, up to ``context``, after which a chunk is not absorbed."""
    if not is_absorbed(widths, weight, chunk, context):
        return context
    low, high = 0, context
    while low < high - 1:
        middle = (low + high) // 2
        if is_absorbed(widths, weight, chunk, middle):
            high = middle
        else:
            low = middle
    return low


def _absorbed_bytes(
    arrays: LatentArrays, copies: _Copies, queries: int, length: int, itemsize: int
) -> int:
    rows = arrays.heads * queries
    return int(
        copies.scores * rows * length * itemsize
        + copies.queries * rows * arrays.query * itemsize
        + copies.keys * length * arrays.query * itemsize
        + copies.outputs * rows * arrays.widths.latent * _FLOAT32_BYTES
    )


def _block_bytes(
    arrays: LatentArrays, copies: _Copies, queries: int, length: int, itemsize: int
) -> int:
    rows = arrays.heads * queries
    expanded = arrays.widths.expanded
    return int(
        copies.scores * rows * length * itemsize
        + copies.queries * rows * (expanded + arrays.rope) * itemsize
        + copies.keys * arrays.heads * length * (expanded + arrays.rope) * itemsize
        + copies.outputs * rows * expanded // 2 * _FLOAT32_BYTES
    )
