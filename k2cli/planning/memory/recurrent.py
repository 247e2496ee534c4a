"""The memory of recurrent layers (state-space, linear attention) beside their state: modelled.

A chunk of a prompt takes two things, fitted to MLX's own peaks on the CPU
(docs/design/memory-model.md shows every point):

*One layer's arrays*, while it is computed. Mamba-2 (``blocks``) works in blocks of 256 tokens with
arrays of all pairs of tokens for every head, in float32, whatever the float type of the model. The
others make every token's state: gated delta rules and Mamba once, Jamba's some eleven times, since
each token's update copies the states of the whole chunk and ten operations are in flight.

*What each layer leaves* until all layers are done. If the states of all layers are evaluated
together, as mlx-lm does, MLX computes the last operations of every layer last: each layer keeps
its last block of pairs (``exp`` of the decay) and the inputs of its new state. The state of a
convolution is a view of its input, which stays in memory.

k2 evaluates layer by layer, so that a run takes less than is modelled here: 64 MB where mlx-lm
takes 107. A plan keeps room for the larger figure, because only that has been published for Metal
(granite-4.0-h-small: mlx-lm PR 525).

Metal has not been measured: its arrays are those of the CPU, but for gated delta rules it has a
kernel, which makes no states of tokens. CUDA holds more and is in ``memory/recurrent_cuda.py``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from k2cli.choices import Device

if TYPE_CHECKING:
    from k2cli.sharding.recurrence import Kind, Recurrence

FLOAT32_BYTES = 4
BLOCK_TOKENS = 256
"""Tokens of a block of Mamba-2: ``step`` of ``ssm_attn`` in mlx-lm."""

# Mamba-2: copies of one layer's arrays at the peak of a chunk.
_PAIRS = 2.0
"""Blocks of pairs."""

_PROJECTED, _PROJECTED_FLOAT32 = 2.5, 3.8
"""The widest projection, in the model's float type and in float32."""

_PROJECTED_FLOAT32_APART = 2.6
"""The latter in PLaMo 2, whose B, C and time steps have a projection of their own."""

_STATE_INPUTS = 0.4
"""Inputs of the state, for each head."""

_OLD_STATES = 0.7
"""Part of a layer's old state that is still there while its new one waits for the others."""

_CONVOLUTION_LEFT = 2.5
"""Copies of its input that a short convolution leaves, with the projection that it is a part of."""

# The other kinds: copies of the state of each token of the chunk, and of the layer's width.
_TOKEN_STATES: dict[Kind, tuple[float, float]] = {
    "steps": (0.97, 4.7), "expanded steps": (11.3, 0.0), "delta": (1.18, 0.0),
    "wkv": (1.0, 6.3), "linear": (1.0, 9.0), "scan": (1.0, 22.0), "convolution": (0.0, 8.0),
}  # fmt: skip
# Copies of a sequence's state of one layer at the peak of a decode step.
_DECODE_STATES: dict[Kind, float] = {
    "blocks": 1.3, "steps": 5.9, "expanded steps": 4.1, "delta": 3.9, "wkv": 2.5, "linear": 1.3,
    "scan": 8.0, "convolution": 4.0,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class RecurrentBytes:
    """Bytes at the peak: of the layer that is computed, and of what layers leave.

    ``left_bytes`` is what all layers leave; ``left_before_attention_bytes`` is what is there while
    the last layer with attention is computed.
    """

    layer_bytes: int
    left_bytes: int
    left_before_attention_bytes: int


def recurrent_prefill(
    recurrence: Recurrence, *, device: Device, chunk: int, itemsize: int, layers: int
) -> RecurrentBytes:
    """Model a chunk of a prompt of one sequence.

    Args:
        layers: recurrent layers of this rank.
    """
    each = _left_bytes(recurrence, chunk, itemsize)
    left, before = layers * each, min(layers, recurrence.before_attention) * each
    if recurrence.in_parallel:
        left = before = max(0, layers - 1) * each  # the layer itself is still being computed
    width = chunk * recurrence.inner
    if recurrence.kind == "blocks":
        block = min(chunk, BLOCK_TOKENS)
        pairs = recurrence.heads * block * block * FLOAT32_BYTES
        inputs = recurrence.heads * recurrence.state_size * block * FLOAT32_BYTES
        joint = recurrence.projected > 2 * recurrence.inner
        in_float32 = _PROJECTED_FLOAT32 if joint else _PROJECTED_FLOAT32_APART
        wide = _PROJECTED * itemsize + in_float32 * FLOAT32_BYTES
        layer = _PAIRS * pairs + wide * chunk * recurrence.projected + _STATE_INPUTS * inputs
    elif recurrence.kind == "delta" and device == "metal":
        layer = 6 * chunk * recurrence.convolved * FLOAT32_BYTES
    else:
        states, widths = _TOKEN_STATES[recurrence.kind]
        # States of delta rules are float32; a single layer of Mamba has half of them at a time.
        size = FLOAT32_BYTES if recurrence.kind == "delta" else itemsize
        share = 0.5 if recurrence.kind == "steps" and layers == 1 else 1.0
        layer = share * width * size * (states * recurrence.state_size + widths)
    return RecurrentBytes(int(layer), left, before)


def _left_bytes(recurrence: Recurrence, chunk: int, itemsize: int) -> int:
    """Return what one layer leaves in memory until all are done."""
    convolved = chunk * recurrence.convolved * itemsize
    left = convolved + int(_OLD_STATES * recurrence.state_elements * FLOAT32_BYTES)
    if recurrence.kind == "blocks":
        block = min(chunk, BLOCK_TOKENS)
        pairs = recurrence.heads * block * block * FLOAT32_BYTES
        # Inputs of the new state are those of the last block; some views keep the whole chunk.
        inputs = (block + chunk) // 2 * recurrence.inner * FLOAT32_BYTES
        return left + pairs + convolved + inputs
    if recurrence.kind == "convolution":
        return int(_CONVOLUTION_LEFT * convolved)
    if recurrence.kind == "expanded steps":
        return left + chunk * recurrence.state_elements * itemsize
    return left


def recurrent_decode_bytes(recurrence: Recurrence, *, rows: int, itemsize: int) -> int:
    """Model one layer's step of ``rows`` sequences."""
    size = FLOAT32_BYTES if recurrence.kind in ("blocks", "delta") else itemsize
    return int(_DECODE_STATES[recurrence.kind] * rows * recurrence.state_elements * size)
