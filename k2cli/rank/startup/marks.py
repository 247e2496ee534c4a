"""Marks of hidden states and logits, by which the link check compares them between ranks and runs.

Arrays that must be equal to the bit are compared by checksums. A GPU need not compute the same bits
twice, nor two kinds of GPU the same; there the products with a few fixed vectors of signs tell
rounding from wrong data. The mean square of such products of a difference is the square of its
length, so they estimate how much two arrays differ relative to their length.
"""

from __future__ import annotations

import hashlib
import math
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn

from k2cli.protocol import Marks
from k2cli.rank.array_bytes import array_bytes

_PROJECTIONS = 4
# Positions whose numbers are converted to float32 at once.
_POSITIONS_AT_ONCE = 512


def mark(value: mx.array) -> Marks:
    """Return the marks of an array ``[..., positions, width]``."""
    rows = mx.contiguous(value.reshape(-1, value.shape[-1]))
    data = array_bytes(rows)
    width = len(data) // max(len(rows), 1)
    checksums = [zlib.crc32(data[row * width : (row + 1) * width]) for row in range(len(rows))]
    signs = _signs(rows.shape[-1])
    norms: list[float] = []
    projections: list[list[float]] = []
    for first in range(0, len(rows), _POSITIONS_AT_ONCE):
        part = rows[first : first + _POSITIONS_AT_ONCE].astype(mx.float32)
        norms += cast("list[float]", mx.linalg.norm(part, axis=-1).tolist())
        projections += cast("list[list[float]]", (part @ signs).tolist())
    return Marks(checksums, norms, projections)


def _signs(width: int) -> mx.array:
    chosen = mx.random.bernoulli(0.5, (width, _PROJECTIONS), key=mx.random.key(width))
    return mx.where(chosen, 1.0, -1.0)


def first_difference(one: Marks, other: Marks, bound: float) -> tuple[int, float] | None:
    """Find the first position in which two arrays differ by more than ``bound``.

    Args:
        one: marks of the first array.
        other: marks of the second array.
        bound: difference relative to the length of the vector; 0: every bit must be equal.

    Returns:
        The position and an estimate of the relative difference there, or None. One that cannot be
        computed is infinite, as that of an array of another length.
    """
    for position, (a, b) in enumerate(zip(one.checksums, other.checksums, strict=False)):
        if a == b:
            continue
        difference = _relative_difference(one, other, position)
        if not difference <= bound or not bound:
            return position, difference
    lengths = len(one.checksums), len(other.checksums)
    return (min(lengths), math.inf) if lengths[0] != lengths[1] else None


def _relative_difference(one: Marks, other: Marks, position: int) -> float:
    pairs = zip(one.projections[position], other.projections[position], strict=True)
    squares = [(a - b) ** 2 for a, b in pairs]
    length = max(one.norms[position], other.norms[position])
    found = math.sqrt(sum(squares) / len(squares)) / length if length > 0 else 0.0
    return found if math.isfinite(found) else math.inf


def cache_digest(caches: Sequence[Any]) -> str:
    """Return the SHA-256 (16 hexadecimal digits) of the contents of KV caches, layer by layer."""
    digest = hashlib.sha256()
    for cache in caches:
        for value in _arrays(cache.state):
            digest.update(array_bytes(value))
    return digest.hexdigest()[:16]


def _arrays(state: Any) -> Iterator[mx.array]:
    if isinstance(state, mx.array):
        yield state
    elif isinstance(state, list | tuple):
        for each in state:
            yield from _arrays(each)


@contextmanager
def kept_output(layer: nn.Module) -> Iterator[list[mx.array]]:
    """Keep the hidden states that a layer returns, while the body runs its model.

    The layer becomes an object of a class that differs in this alone: a wrapper would hide
    attributes that models read of their layers.
    """
    kind = type(layer)
    kept: list[mx.array] = []

    def call(self: Any, *arguments: Any, **named: Any) -> Any:
        result = kind.__call__(self, *arguments, **named)
        parts = result if isinstance(result, list | tuple) else (result,)
        kept[:] = [each for each in parts if isinstance(each, mx.array) and each.ndim == 3][:1]
        return result

    layer.__class__ = type(kind.__name__, (kind,), {"__call__": call})
    try:
        yield kept
    finally:
        layer.__class__ = kind
