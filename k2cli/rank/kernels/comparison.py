"""Comparison of what a device computed with what is right, and the error that ends a run."""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from k2cli.errors import ClusterError
from k2cli.pip_command import pip_install


def relative_error(found: mx.array, wanted: mx.array) -> float:
    """Return the largest difference, relative to the largest wanted value."""
    found, wanted = found.astype(mx.float32), wanted.astype(mx.float32)
    scale = mx.maximum(mx.abs(wanted).max(), 1e-30)
    error: Any = (mx.abs(found - wanted).max() / scale).item()
    return float(error)


def wrong_product(part: str, *, outputs: int, inputs: int, bits: int, error: float) -> ClusterError:
    """Return the error for a product that this device computes wrong.

    Args:
        part: what was multiplied, such as ``expert 3 of 384``.
    """
    return ClusterError(
        f"this device multiplies {part} ({outputs:,} by {inputs:,}, {bits} bits) wrong: by "
        f"{error:.2g} of the largest result; answers would be fluent and wrong",
        f"another version of mlx may do it right: {pip_install('--upgrade', 'mlx', 'mlx-lm')}",
    )
