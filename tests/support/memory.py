"""MLX's memory as a test measures it."""

from __future__ import annotations

import gc

import mlx.core as mx


def held_bytes() -> int:
    """Return the bytes that arrays in use take, and start a new peak.

    Models of earlier tests are parts of reference cycles. Were they freed only while a peak is
    measured, it would seem smaller by their size.
    """
    gc.collect()
    mx.synchronize()
    mx.clear_cache()
    mx.reset_peak_memory()
    return mx.get_active_memory()
