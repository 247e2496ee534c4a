"""The memory that a step takes beside its other arrays if the KV cache is quantized: modelled.

A chunk of a prompt dequantizes the keys and values of one layer (``sharding.kv_cache.quantized``).
On a CPU, MLX unpacks them in several operations, through words of 4 bytes; ``_CPU_COPIES`` was
fitted to its peaks (docs/measurements/quantized-kv.md). On Metal a kernel writes them, and they are
counted once: modelled, not measured.

A decode step multiplies with the quantized arrays, and writes the scores of a layer even where the
attention of an ordinary cache is fused. A CPU first copies the quantized arrays of the layer.
"""

from __future__ import annotations

from math import ceil
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from k2cli.choices import Device
    from k2cli.planning.memory.prefill import ActivationShape
    from k2cli.sharding.profile import QuantizedLayer

# By bytes of an element of activations, then by bits: copies of dequantized keys and values.
_CPU_COPIES = {4: {8: 2.0, 4: 1.55}, 2: {8: 5.0, 4: 4.5}}
# Scores, and a masked copy of them.
_SCORES = 2


def quantized_prefill_bytes(
    layer: QuantizedLayer, *, device: Device, context_length: int, itemsize: int
) -> int:
    """Return what dequantizing adds to the peak of prefill.

    Args:
        layer: the layer of the rank's slice that keeps the most keys and values.
        context_length: tokens in the cache at the end.
        itemsize: bytes per element of activations.
    """
    copies = _CPU_COPIES[itemsize][layer.bits] if device == "cpu" else 1.0
    return int(copies * layer.dequantized_bytes * context_length)


def quantized_decode_bytes(
    layer: QuantizedLayer,
    shape: ActivationShape,
    *,
    device: Device,
    context_length: int,
    concurrency: int,
    itemsize: int,
    slices: int,
    queries: int = 1,
) -> int:
    """Return what attention to quantized keys and values adds to the peak of a decode step.

    Args:
        queries: new tokens of each sequence; several in a step that verifies a draft.
    """
    tokens = context_length * concurrency
    if device == "cpu":
        return layer.stored_bytes * tokens
    return _SCORES * ceil(shape.heads / slices) * queries * tokens * itemsize
