"""Self-contained SVG picture of a plan, for a web page, a mail or an issue."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING
from xml.sax.saxutils import escape

from k2cli.errors import UsageError
from k2cli.files import unwritable, write_atomically
from k2cli.ui.plan.bars import PARTS, short_name
from k2cli.ui.plan.curves import (
    context_text,
    decode_band,
    positions,
    rounded_up,
    stacked,
    with_speed,
)
from k2cli.ui.plan.table import headline, rate_text, verdict
from k2cli.units import GB, MB, format_bytes, one_line

if TYPE_CHECKING:
    from k2cli.planning.curve import CurvePoint
    from k2cli.planning.plan import NodeBudget, Plan

_WIDTH, _MARGIN = 880, 32
_COLOURS = ("#3b6fb6", "#3f9c6c", "#e0a030", "#9a6fb0")
_TITLES = ("weights", "KV cache", "activation", "overhead")
_INK, _MUTED, _RULE, _LIMIT = "#1d2733", "#66727f", "#d9dee4", "#c0392b"
_FONT = "system-ui, -apple-system, 'Segoe UI', 'DejaVu Sans', sans-serif"
_BAR_LEFT, _BAR_HEIGHT, _BAR_STEP = 190, 24, 40
_CHART_HEIGHT = 190


def plan_svg(plan: Plan, points: Sequence[CurvePoint]) -> str:
    """Draw the plan: headline, a bar per node, and charts of memory and speed against context.

    Args:
        points: from short to long contexts; the charts are left out if there are fewer than two.
    """
    body = [*_head(plan)]
    y = 64.0 + 22 * len(headline(plan))
    drawn, y = _bars(plan.nodes, y)
    body += drawn
    if len(points) > 1:
        asked = plan.request.context_length
        drawn, y = _memory_chart(points, asked, y + 24)
        body += drawn
        timed = with_speed(points)
        if len(timed) > 1:
            drawn, y = _speed_chart(timed, asked, y + 24)
            body += drawn
    title = _escaped(f"{plan.model.reference}: {verdict(plan)}")
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{y:.0f}" '
            f'viewBox="0 0 {_WIDTH} {y:.0f}" font-family="{escape(_FONT)}" font-size="13" '
            f'fill="{_INK}" role="img">',
            f"<title>{title}</title>",
            f'<rect width="{_WIDTH}" height="{y:.0f}" fill="#ffffff"/>',
            *body,
            "</svg>\n",
        ]
    )


def _escaped(text: str) -> str:
    """Return text for XML, in which control characters have no form at all."""
    return escape(one_line(text))


def _text(
    x: float, y: float, text: str, *, size: int = 13, colour: str = _INK, anchor: str = "start",
    weight: str = "normal",
) -> str:  # fmt: skip
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" fill="{colour}" '
        f'text-anchor="{anchor}" font-weight="{weight}">{_escaped(text)}</text>'
    )


def _rect(x: float, y: float, width: float, height: float, colour: str) -> str:
    return (
        f'<rect x="{x:.1f}" y="{y:.1f}" width="{max(width, 0):.1f}" height="{height:.1f}" '
        f'fill="{colour}"/>'
    )


def _line(x1: float, y1: float, x2: float, y2: float, colour: str, width: float = 1) -> str:
    return (
        f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}" '
        f'stroke-width="{width}"/>'
    )


def _head(plan: Plan) -> list[str]:
    name, *rest = headline(plan)
    lines = [_text(_MARGIN, 44, name, size=19, weight="600")]
    lines += [
        _text(_MARGIN, 68 + 20 * i, line.strip(), colour=_MUTED) for i, line in enumerate(rest)
    ]
    colour = _COLOURS[1] if plan.fits else _LIMIT
    lines.append(_text(_MARGIN, 72 + 20 * len(rest), verdict(plan), colour=colour, weight="600"))
    return lines


def _bars(nodes: Sequence[NodeBudget], y: float) -> tuple[list[str], float]:
    """Draw a bar per node, to one scale, with its limit, and the legend below."""
    width = _WIDTH - _MARGIN - _BAR_LEFT - 90
    scale = width / max(max(node.total_bytes, node.limit_bytes) for node in nodes)
    drawn = []
    y += 24
    for node in nodes:
        middle = y + _BAR_HEIGHT / 2 + 5
        drawn.append(_text(_BAR_LEFT - 12, middle, short_name(node.place, 20), anchor="end"))
        drawn.append(_rect(_BAR_LEFT, y, node.limit_bytes * scale, _BAR_HEIGHT, "#eef1f4"))
        x = float(_BAR_LEFT)
        for field, colour in zip(PARTS, _COLOURS, strict=True):
            part = getattr(node, field) * scale
            drawn.append(_rect(x, y, part, _BAR_HEIGHT, colour))
            x += part
        limit = _BAR_LEFT + node.limit_bytes * scale
        drawn.append(_line(limit, y - 5, limit, y + _BAR_HEIGHT + 5, _LIMIT, 2))
        label = f"{format_bytes(node.total_bytes)} of {format_bytes(node.limit_bytes)}"
        inside = x - _BAR_LEFT > 160
        drawn.append(
            _text(_BAR_LEFT + 8 if inside else x + 8, middle, label,
                  colour="#ffffff" if inside else _INK)
        )  # fmt: skip
        y += _BAR_STEP
    drawn += _legend(y + 6)
    return drawn, y + 16


def _legend(y: float) -> list[str]:
    drawn = []
    x = float(_BAR_LEFT)
    for title, colour in zip(_TITLES, _COLOURS, strict=True):
        drawn += [_rect(x, y - 10, 11, 11, colour), _text(x + 17, y, title, colour=_MUTED)]
        x += 108
    return [
        *drawn,
        _line(x, y - 5, x + 11, y - 5, _LIMIT, 2),
        _text(x + 17, y, "limit", colour=_MUTED),
    ]


class _Frame:
    """Axes of one chart: context on a log scale across, a quantity from 0 upwards."""

    def __init__(self, points: Sequence[CurvePoint], top: float, y: float) -> None:
        self.left, self.right = _MARGIN + 60.0, _WIDTH - _MARGIN - 70.0
        self.top, self.bottom, self.most = y + 30, y + 30 + _CHART_HEIGHT, top
        self.xs = [self.left + at * (self.right - self.left) for at in positions(points)]

    def y(self, value: float) -> float:
        return self.bottom - value / self.most * (self.bottom - self.top)

    def area(self, lower: Sequence[float], upper: Sequence[float], colour: str) -> str:
        corners = list(zip(self.xs, upper, strict=True))
        corners += reversed(list(zip(self.xs, lower, strict=True)))
        path = " ".join(f"{x:.1f},{self.y(value):.1f}" for x, value in corners)
        return f'<polygon points="{path}" fill="{colour}"/>'

    def curve(self, values: Sequence[float], colour: str) -> str:
        path = " ".join(
            f"{x:.1f},{self.y(value):.1f}" for x, value in zip(self.xs, values, strict=True)
        )
        return f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>'

    def asked(self, points: Sequence[CurvePoint], context_length: int) -> list[str]:
        """Draw a vertical line at the context that was asked for."""
        for x, point in zip(self.xs, points, strict=True):
            if point.context_length == context_length:
                label = f"asked: {context_text(context_length)}"
                return [
                    _line(x, self.top, x, self.bottom, _INK),
                    _text(x - 6, self.top - 6, label, size=11, anchor="end"),
                ]
        return []

    def axes(self, points: Sequence[CurvePoint], title: str) -> list[str]:
        drawn = [_text(_MARGIN, self.top - 16, title, weight="600")]
        for quarter in range(5):
            value = self.most * quarter / 4
            drawn.append(_line(self.left, self.y(value), self.right, self.y(value), _RULE))
            drawn.append(
                _text(self.left - 8, self.y(value) + 4, f"{value:,.4g}", size=11, colour=_MUTED,
                      anchor="end")
            )  # fmt: skip
        free_from = 0.0
        for x, point in zip(self.xs, points, strict=True):
            if x >= free_from:
                label = context_text(point.context_length)
                drawn.append(_text(x, self.bottom + 17, label, size=11, colour=_MUTED,
                                   anchor="middle"))  # fmt: skip
                free_from = x + 34
        return drawn


def _memory_chart(points: Sequence[CurvePoint], asked: int, y: float) -> tuple[list[str], float]:
    most = max(max(point.budget.total_bytes, point.budget.limit_bytes) for point in points)
    unit, name = (GB, "GB") if most >= 10 * GB else (MB, "MB")
    frame = _Frame(points, rounded_up(most / unit), y)
    drawn = frame.axes(points, f"Memory of the tightest node against context ({name})")
    lower = [0.0] * len(points)
    for count, colour in enumerate(_COLOURS, start=1):
        upper = [stacked(PARTS[:count])(point) / unit for point in points]
        drawn.append(frame.area(lower, upper, colour))
        lower = upper
    limits = [point.budget.limit_bytes / unit for point in points]
    drawn.append(frame.curve(limits, _LIMIT))
    drawn += frame.asked(points, asked)
    drawn.append(_text(frame.right + 8, frame.y(limits[-1]) + 4, "limit", colour=_LIMIT))
    return drawn, frame.bottom + 34


def _speed_chart(points: Sequence[CurvePoint], asked: int, y: float) -> tuple[list[str], float]:
    bands = [decode_band(point) for point in points]
    frame = _Frame(points, rounded_up(max(band.high for band in bands)), y)
    title = "Predicted decode speed of one sequence against context (tokens/s)"
    drawn = frame.axes(points, title)
    drawn.append(frame.area([b.low for b in bands], [b.high for b in bands], "#cfdcee"))
    drawn.append(frame.curve([band.expected for band in bands], _COLOURS[0]))
    drawn += frame.asked(points, asked)
    last = bands[-1]
    drawn.append(_text(frame.right + 8, frame.y(last.expected) + 4, rate_text(last.expected)))
    return drawn, frame.bottom + 34


def save_svg(plan: Plan, points: Sequence[CurvePoint], path: Path) -> None:
    """Write the picture to a file, atomically.

    Raises:
        UsageError: if the file cannot be written.
    """
    try:
        write_atomically(path, plan_svg(plan, points))
    except OSError as error:
        raise unwritable(error, path, UsageError) from error
