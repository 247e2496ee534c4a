"""Interpolation of memory and speed between planned contexts, shared by text plot and SVG."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from k2cli.planning.curve import CurvePoint
    from k2cli.planning.speed.estimate import Band


def positions(points: Sequence[CurvePoint]) -> list[float]:
    """Map each point to 0 to 1 between the shortest and the longest context, on a log scale."""
    first, last = points[0].context_length, points[-1].context_length
    if first == last:
        return [0.5 for _ in points]
    whole = math.log(last / first)
    return [math.log(point.context_length / first) / whole for point in points]


def between(points: Sequence[CurvePoint], at: float, value: Callable[[CurvePoint], float]) -> float:
    """Interpolate a value linearly at a position from 0 to 1."""
    places = positions(points)
    for index in range(1, len(points)):
        if at <= places[index]:
            share = (at - places[index - 1]) / (places[index] - places[index - 1])
            before, after = value(points[index - 1]), value(points[index])
            return before + (after - before) * min(max(share, 0.0), 1.0)
    return value(points[-1])


def stacked(part: Sequence[str]) -> Callable[[CurvePoint], float]:
    """Return a function that adds up some fields of a point's memory budget, in bytes."""
    return lambda point: float(sum(getattr(point.budget, field) for field in part))


def context_text(tokens: int) -> str:
    """Format a context length: ``1k``, ``128k``, ``1,000``."""
    return f"{tokens // 1024}k" if tokens % 1024 == 0 else f"{tokens:,}"


def rounded_up(value: float) -> float:
    """Round up to a round number for the top of an axis, such as 2, 2.5 or 40."""
    if value <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(value))
    return next(step * power for step in (1, 2, 2.5, 4, 5, 6, 8, 10) if step * power >= value)


def decode_band(point: CurvePoint) -> Band:
    """Return the decode speed of a point that has one."""
    assert point.decode_tokens_per_second is not None
    return point.decode_tokens_per_second


def with_speed(points: Sequence[CurvePoint]) -> list[CurvePoint]:
    """Return the points with a predicted speed: those that fit, on machines of known speed."""
    return [point for point in points if point.decode_tokens_per_second is not None]
