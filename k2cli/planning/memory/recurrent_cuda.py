"""The memory of recurrent layers on CUDA beside their state: fitted to grids of an H200.

CUDA keeps what an operation reads until its whole graph is done, with ten graphs in flight
(``memory/decode.py``). So more is held than on the CPU (``memory/recurrent.py``): the arrays of
Mamba-2's blocks in part for all layers, and some tens of states of tokens where a layer computes
token by token. Figures stand for what is held in addition to the arrays of a layer with attention.
docs/design/memory-model.md shows every point. RecurrentGemma has not been measured on CUDA: its
arrays are the CPU's, for all layers together.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from k2cli.planning.memory.recurrent import BLOCK_TOKENS, FLOAT32_BYTES

if TYPE_CHECKING:
    from k2cli.sharding.recurrence import Kind, Recurrence

# Mamba-2. A block of pairs is what one layer holds for all pairs of 256 tokens; a state is that of
# one layer.
_PAIRS_OF_LAYERS = 2.2
"""Blocks of pairs that each layer holds."""

_STATES_OF_LAYERS = 8.6
"""States that each layer holds."""

_PAIRS_OF_CHUNK = 5.2
"""Blocks of pairs that one layer holds for each block of the chunk."""

_PAIRS_REPEATED = 3.2
"""Further ones, for each block of the chunk, where B is repeated over groups of heads."""

_PAIRS_IN_PARALLEL, _STATES_IN_PARALLEL = 7.6, 10.5
"""Blocks of pairs for each block of the chunk, and states, of a layer that also has attention.

Falcon-H1 has such layers, and is computed layer by layer.
"""

# Layers that compute token by token: states held for each token of the chunk, and in flight.
_TOKEN_STATES: dict[Kind, tuple[float, float]] = {
    "steps": (1.0, 25.5), "delta": (1.02, 50.0), "wkv": (0.95, 24.0), "linear": (0.95, 28.0),
}  # fmt: skip
# Jamba's updates copy the states of the whole chunk. Copies in flight: a number, more for each
# token of the chunk, and a limit. In float32 there were never more than 55; in 16 bit there were
# 73 with the largest chunk that was measured.
_COPIES, _COPIES_PER_TOKEN, _MOST_COPIES_FLOAT32, _MOST_COPIES = 31.0, 0.32, 55.0, 100.0
# Short convolutions: copies of each layer's input, and tokens that are in flight besides.
_CONVOLUTION_INPUTS, _CONVOLUTION_TOKENS = 14.0, 20
_SCAN_WIDTHS = 23.0
"""RecurrentGemma: arrays of the unit's width for each token of the chunk, in each layer."""

# Decode, in states of one layer: a fixed number, and more for each sequence, in 16 bit and float32.
_DECODE_STATES: dict[Kind, tuple[float, float, float]] = {
    "blocks": (0.0, 1.2, 1.2), "steps": (0.0, 3.35, 3.65), "expanded steps": (9.0, 2.28, 2.28),
    "delta": (0.0, 3.2, 3.75), "wkv": (0.0, 2.5, 2.5), "linear": (0.0, 1.3, 1.3),
    "scan": (0.0, 8.0, 8.0), "convolution": (30.0, 4.0, 4.0),
}  # fmt: skip


def cuda_prefill_bytes(recurrence: Recurrence, *, chunk: int, itemsize: int, layers: int) -> int:
    """Model a chunk of a prompt of one sequence, all recurrent layers together.

    Args:
        layers: recurrent layers of this rank.
    """
    if not layers:
        return 0
    if recurrence.kind == "blocks":
        return int(_blocks_bytes(recurrence, chunk, layers))
    if recurrence.kind == "convolution":
        width = layers * recurrence.inner * itemsize
        return int(_CONVOLUTION_INPUTS * width * (chunk + _CONVOLUTION_TOKENS))
    if recurrence.kind == "scan":
        return int(_SCAN_WIDTHS * layers * chunk * recurrence.inner * itemsize)
    # States of delta rules are float32.
    size = FLOAT32_BYTES if recurrence.kind == "delta" else itemsize
    state = recurrence.state_elements * size
    if recurrence.kind == "expanded steps":
        most = _MOST_COPIES_FLOAT32 if itemsize == FLOAT32_BYTES else _MOST_COPIES
        return int(min(_COPIES + _COPIES_PER_TOKEN * chunk, most) * chunk * state)
    per_token, in_flight = _TOKEN_STATES[recurrence.kind]
    return int((per_token * chunk + in_flight) * state)


def _blocks_bytes(recurrence: Recurrence, chunk: int, layers: int) -> float:
    block = min(chunk, BLOCK_TOKENS)
    pairs = recurrence.heads * block * block * FLOAT32_BYTES
    blocks = chunk / block
    state = recurrence.state_elements * FLOAT32_BYTES
    if recurrence.in_parallel:
        return _PAIRS_IN_PARALLEL * blocks * pairs + _STATES_IN_PARALLEL * state
    of_chunk = _PAIRS_OF_CHUNK + (_PAIRS_REPEATED if recurrence.repeats_groups else 0.0)
    of_layers = _PAIRS_OF_LAYERS * pairs + _STATES_OF_LAYERS * state
    return of_chunk * blocks * pairs + layers * of_layers


def cuda_decode_bytes(recurrence: Recurrence, *, rows: int, itemsize: int) -> int:
    """Model one layer's step of ``rows`` sequences."""
    size = FLOAT32_BYTES if recurrence.kind in ("blocks", "delta") else itemsize
    fixed, in_16_bit, in_float32 = _DECODE_STATES[recurrence.kind]
    each = in_float32 if itemsize == FLOAT32_BYTES else in_16_bit
    return int((fixed + each * rows) * recurrence.state_elements * size)
