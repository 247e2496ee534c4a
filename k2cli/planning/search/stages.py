"""All the stages that a pipeline could have on a node: their memory and their time, as matrices.

``[first, past_last]`` of a matrix is the stage that holds layers ``[first, past_last)``, with the
embedding, or norm and head, as they fall. The arithmetic is that of ``memory.py``.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from k2cli.planning.hardware.machine import NodeMemory
from k2cli.planning.memory.ledger import overhead_bytes
from k2cli.planning.speed.estimate import decode_layer_seconds

if TYPE_CHECKING:
    from k2cli.planning.search.traced_model import Slices


_MOST_BYTES = 2**58
"""More than any machine has, and little enough for sums of it to stay within 64 bits: a config may
describe a model that is larger. Budgets are of Python's integers, so that it still does not fit."""


@dataclass(frozen=True, slots=True)
class StageBytes:
    """Weights and cache of all stages, ``int64 [layers + 1, layers + 1]``, whatever the node."""

    weights: Any
    cache: Any
    layers: Any


def stage_bytes(
    whole: Slices, context_length: int, concurrency: int, chunk_tokens: int
) -> StageBytes:
    """Weights and cache bytes of every stage that the whole model could be cut to."""
    import numpy as np

    profile = whole.profile
    weights = _ranges(profile.weights_before())
    size = weights.shape[0]
    weights += profile.common_bytes
    weights[0, :] += profile.embedding_bytes
    weights[:, -1] += profile.output_bytes
    weights[1:, -1] += profile.tied_bytes
    caches = [size * concurrency for size in profile.cache_bytes(context_length, chunk_tokens)]
    cache = _ranges(list(accumulate(caches, initial=0)))
    positions = np.arange(size)
    layers = np.maximum(positions[None, :] - positions[:, None], 1)
    return StageBytes(weights, cache, layers)


def _ranges(before: list[int]) -> Any:
    """From sums before each position to sums of each range."""
    import numpy as np

    sums = np.array([min(size, _MOST_BYTES) for size in before], dtype=np.int64)
    return sums[None, :] - sums[:, None]


def stage_totals(
    held: StageBytes, activation_bytes: int, last_activation_bytes: int, communication: int
) -> Any:
    """What every stage takes in all, ``int64 [layers + 1, layers + 1]``; the last stage samples."""
    import numpy as np

    activation = np.full_like(held.weights, min(activation_bytes, _MOST_BYTES))
    activation[:, -1] = min(last_activation_bytes, _MOST_BYTES)
    overhead = overhead_bytes(held.cache, activation, held.layers, communication)
    return held.weights + held.cache + activation + overhead


def stage_seconds(whole: Slices, node: NodeMemory, context_length: int) -> Any:
    """Seconds that one token spends in every stage on a node, ``float64`` likewise.

    Where a node's speed is not known all nodes are taken to be equally fast, and the unit is that
    of bytes read; without even the bytes read, of layers.
    """
    import numpy as np

    count = whole.profile.layer_count
    layers, head = [1.0] * count, 0.0
    if whole.work is not None:
        known = decode_layer_seconds(whole.work, node, context_length)
        if known is not None:
            layers, head = known
        else:
            work = whole.work
            layers = [each.weights_read(1) + each.cache_read(context_length)
                      for each in work.layers]  # fmt: skip
            head = work.head.weights_read(1)
    before = np.array(list(accumulate(layers, initial=0.0)))
    seconds = before[None, :] - before[:, None]
    seconds[:, -1] += head
    return seconds
