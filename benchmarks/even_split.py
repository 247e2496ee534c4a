"""An even split of layers, for tests and for measurements that were made with one."""

from __future__ import annotations


def even_split(layer_count: int, stages: int) -> tuple[tuple[int, int], ...]:
    """Split layers into half-open ranges by rank, as equal as possible; low ranks get the rest.

    61 layers on 2 ranks: rank 0 holds (30, 61) and rank 1 (0, 30), as mlx-lm splits them.

    Raises:
        ValueError: if there are fewer layers than stages.
    """
    if not 1 <= stages <= layer_count:
        raise ValueError(f"{layer_count} layers cannot be split into {stages} stages")
    base, extra = divmod(layer_count, stages)
    ranges: list[tuple[int, int]] = []
    past_last = layer_count
    for rank in range(stages):
        first = past_last - base - (1 if rank < extra else 0)
        ranges.append((first, past_last))
        past_last = first
    return tuple(ranges)
