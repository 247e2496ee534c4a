"""The split of layers into stages whose costliest stage is cheapest, by dynamic programming.

A matrix has the cost of every stage that a node could hold: ``[first, past_last]`` is the stage
with layers ``[first, past_last)``, infinite if the node cannot hold it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Costs = NDArray[np.float64]
    """``[layers + 1, layers + 1]``; entries with ``row >= column`` are never read."""

Ranges = tuple[tuple[int, int], ...]
"""Half-open layer ranges, first stage first."""

_ROUNDING = 1e-12


def best_split(costs: Sequence[Costs], preferences: Sequence[Costs]) -> tuple[float, Ranges] | None:
    """Cut layers into stages so that the costliest stage costs as little as possible.

    Args:
        costs: one matrix per stage, first stage first.
        preferences: one matrix per stage; of the splits whose costliest stage is equally cheap,
            the one with the least sum of preferences is taken. Finite wherever the cost is.

    Returns:
        The cost of the costliest stage, and half-open layer ranges, first stage first; None if
        there is no split with a finite cost and at least one layer per stage.
    """
    import numpy as np

    size = costs[0].shape[0]
    forward = np.arange(size)[:, None] < np.arange(size)[None, :]
    usable = [np.where(forward, matrix, np.inf) for matrix in costs]
    least = _start(size, -np.inf)
    for matrix in usable:
        least = np.maximum(least[:, None], matrix).min(axis=0)
    costliest = float(least[-1])
    if not np.isfinite(costliest):
        return None
    # A negative cost is headroom.
    allowed = costliest + abs(costliest) * _ROUNDING
    cheapest = cheapest_split(
        [
            np.where(matrix <= allowed, preferred, np.inf)
            for matrix, preferred in zip(usable, preferences, strict=True)
        ]
    )
    return None if cheapest is None else (costliest, cheapest)


def cheapest_split(costs: Sequence[Costs]) -> Ranges | None:
    """Cut layers into stages with the least sum of costs.

    Args:
        costs: one matrix per stage, first stage first; infinite where ``row >= column``.

    Returns:
        As ``best_split``.
    """
    size = costs[0].shape[0]
    least = _start(size, 0.0)
    begins: list[Any] = []
    for matrix in costs:
        sums = least[:, None] + matrix
        begins.append(sums.argmin(axis=0))
        least = sums.min(axis=0)
    if not math.isfinite(float(least[-1])):
        return None
    ranges: list[tuple[int, int]] = []
    past_last = size - 1
    for begin in reversed(begins):
        first = int(begin[past_last])
        ranges.append((first, past_last))
        past_last = first
    return tuple(reversed(ranges))


def _start(size: int, cost: float) -> Any:
    """Return the costs before any layer is placed: a stage can only begin at position 0."""
    import numpy as np

    start = np.full(size, np.inf)
    start[0] = cost
    return start
