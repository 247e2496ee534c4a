"""Where to cut a pipeline: evenly if that fits, else so that every stage is equally full.

Pure arithmetic over bytes per layer; what a cut really holds is traced afterwards.
"""

from __future__ import annotations

from collections.abc import Sequence

_SEARCH_STEPS = 40


def balanced_split(
    layer_bytes: Sequence[int],
    capacities: Sequence[int],
    first_extra_bytes: int,
    last_extra_bytes: int,
) -> tuple[tuple[int, int], ...] | None:
    """Cut layers so that the fullest stage is as little full as possible.

    Args:
        layer_bytes: weights and cache of each decoder layer.
        capacities: bytes that each rank has for layers, by rank; rank 0 is the last stage.
        first_extra_bytes: what the first stage holds besides, the embedding.
        last_extra_bytes: what the last stage holds besides, norm and head.

    Returns:
        Half-open layer ranges by rank, or None if there are fewer layers than ranks or a rank has
        no room at all. The ranges may overfill a stage where everything together is too much.
    """
    if len(capacities) > len(layer_bytes) or min(capacities) <= 0:
        return None
    extras = [0] * len(capacities)
    extras[-1] += first_extra_bytes
    extras[0] += last_extra_bytes
    # The share of its capacity that the fullest stage uses; 1.0 is full.
    low, high = 0.0, 2.0 * (sum(layer_bytes) + sum(extras)) / min(capacities) + 1.0
    best: tuple[tuple[int, int], ...] | None = None
    for _ in range(_SEARCH_STEPS):
        share = (low + high) / 2
        room = [int(share * capacity) - extra for capacity, extra in zip(
            capacities, extras, strict=True)]  # fmt: skip
        ranges = _fill(layer_bytes, room)
        if ranges is None:
            low = share
        else:
            best, high = ranges, share
    return best


def _fill(layer_bytes: Sequence[int], room: Sequence[int]) -> tuple[tuple[int, int], ...] | None:
    """Give each stage, first to last, as many layers as it has room for; None if some are left.

    Every stage must get one, so a stage leaves enough layers for those after it.
    """
    ranges: list[tuple[int, int]] = []
    position, count = 0, len(layer_bytes)
    for stage, rank in enumerate(reversed(range(len(room)))):
        latest = count - (len(room) - 1 - stage)
        used, past_last = 0, position
        while past_last < latest and used + layer_bytes[past_last] <= room[rank]:
            used += layer_bytes[past_last]
            past_last += 1
        if past_last == position:
            return None
        ranges.append((position, past_last))
        position = past_last
    return tuple(reversed(ranges)) if position == count else None
