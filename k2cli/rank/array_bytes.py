"""The bytes of MLX arrays, for digests and files."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, cast

import mlx.core as mx

if TYPE_CHECKING:
    from typing_extensions import Buffer


def array_bytes(array: mx.array) -> memoryview:
    """Return the bytes of an array, row by row, which is computed for that if need be."""
    if not array.size:
        return memoryview(b"")
    flat = mx.contiguous(array).reshape(-1).view(mx.uint8)
    # An mlx array exports a buffer, although its type stub does not say so.
    return memoryview(cast("Buffer", flat))


def array_digest(array: mx.array) -> str:
    """Return the SHA-256 (16 hexadecimal digits) of an array's bytes."""
    return hashlib.sha256(array_bytes(array)).hexdigest()[:16]
