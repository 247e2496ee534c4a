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

    def ranges_at(share: float) -> tuple[tuple[int, int], ...] | None:
        room = [int(share * capacity) for capacity in capacities]
        return _fill(layer_bytes, [size - extra for size, extra in zip(room, extras, strict=True)])

    # The share of its capacity that the fullest stage uses. At 1.0 it is just full, which is
    # tried by itself so that rounding cannot lose a split that fits exactly.
    best = ranges_at(1.0)
    low, high = 0.0, 1.0
    if best is None:
        low, high = 1.0, 2.0 * (sum(layer_bytes) + sum(extras)) / min(capacities) + 1.0
    for _ in range(_SEARCH_STEPS):
        share = (low + high) / 2
        ranges = ranges_at(share)
        if ranges is None:
            low = share
        else:
            best, high = ranges, share
    return best


def _fill(layer_bytes: Sequence[int], room: Sequence[int]) -> tuple[tuple[int, int], ...] | None:
    """Any cut in which every stage has a layer at least and none more than its room, or None.

    Keeps, stage by stage, every place where the cut behind it can be: giving a stage all that it
    has room for is not enough, as it may leave the next one a first layer that is too big.
    """
    count = len(layer_bytes)
    reached: list[dict[int, int]] = [{0: 0}]  # past the stage -> where the stage began
    for rank in reversed(range(len(room))):
        reached.append(_ends(layer_bytes, sorted(reached[-1]), room[rank]))
    if count not in reached[-1]:
        return None
    ranges: list[tuple[int, int]] = []
    past_last = count
    for begins in reversed(reached[1:]):
        ranges.append((begins[past_last], past_last))
        past_last = begins[past_last]
    return tuple(ranges)


def _ends(layer_bytes: Sequence[int], starts: Sequence[int], room: int) -> dict[int, int]:
    """Where a stage can end that begins at one of ``starts``, and where it then began."""
    ends: dict[int, int] = {}
    past_last = used = position = 0
    for start in starts:
        while position < start:  # layers that a later start leaves out
            if position < past_last:
                used -= layer_bytes[position]
            position += 1
        past_last = max(past_last, start)
        while past_last < len(layer_bytes) and used + layer_bytes[past_last] <= room:
            used += layer_bytes[past_last]
            past_last += 1
        first_new = max(start + 1, max(ends, default=0) + 1)
        ends.update(dict.fromkeys(range(first_new, past_last + 1), start))
    return ends
