"""Memory and speed between the contexts that were planned: what plot and picture both draw."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from k2cli.ui.plan_views import BandView, CurvePointView


def positions(points: Sequence[CurvePointView]) -> list[float]:
    """Where each point lies between the shortest and the longest context, 0 to 1, by logarithm."""
    first, last = points[0].context_length, points[-1].context_length
    if first == last:
        return [0.5 for _ in points]
    whole = math.log(last / first)
    return [math.log(point.context_length / first) / whole for point in points]


def between(
    points: Sequence[CurvePointView], at: float, value: Callable[[CurvePointView], float]
) -> float:
    """A value at a position from 0 to 1, straight between the points around it."""
    places = positions(points)
    for index in range(1, len(points)):
        if at <= places[index]:
            share = (at - places[index - 1]) / (places[index] - places[index - 1])
            before, after = value(points[index - 1]), value(points[index])
            return before + (after - before) * min(max(share, 0.0), 1.0)
    return value(points[-1])


def stacked(part: Sequence[str]) -> Callable[[CurvePointView], float]:
    """The sum of some parts of a point's ledger, in bytes."""
    return lambda point: float(sum(getattr(point.budget, field) for field in part))


def context_text(tokens: int) -> str:
    """Tokens of context, short: ``1k``, ``128k``, ``1000``."""
    return f"{tokens // 1024}k" if tokens % 1024 == 0 else f"{tokens:,}"


def rounded_up(value: float) -> float:
    """The next number of 1, 2, 2.5 or 5 times a power of ten: the top of an axis."""
    if value <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(value))
    return next(step * power for step in (1, 2, 2.5, 4, 5, 6, 8, 10) if step * power >= value)


def decode_band(point: CurvePointView) -> BandView:
    """The decode speed at a point that has one."""
    assert point.decode_tokens_per_second is not None
    return point.decode_tokens_per_second


def with_speed(points: Sequence[CurvePointView]) -> list[CurvePointView]:
    """The points that have a predicted speed: those that fit, on machines whose speed is known."""
    return [point for point in points if point.decode_tokens_per_second is not None]
