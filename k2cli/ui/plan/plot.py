"""Text charts of memory and speed against context, 80 columns wide.

Terminal plotting libraries draw lines and points. These charts need stacked areas with a limit
line, and a band, in few cells, and must look the same in a pipe and in ASCII.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from rich.text import Text

from k2cli.ui.output import print_styled, print_text
from k2cli.ui.plan.bars import PARTS
from k2cli.ui.plan.curves import (
    between,
    context_text,
    decode_band,
    positions,
    rounded_up,
    stacked,
    with_speed,
)
from k2cli.units import GB, MB

if TYPE_CHECKING:
    from k2cli.planning.curve import CurvePoint

_COLUMNS, _ROWS = 64, 12
_MARGIN = 10
_UNICODE, _ASCII = ("█▓▒░", "─", "░", "●"), ("#=+:", "-", ":", "o")
_STYLES = ("blue", "green", "yellow", "magenta")


def plot_lines(points: Sequence[CurvePoint], asked: int, *, unicode: bool = True) -> list[Text]:
    """Draw the memory chart and, if speed is known, the speed chart below it.

    Args:
        asked: the context length of the plan, marked on the axis.
    """
    glyphs = _UNICODE if unicode else _ASCII
    lines = _memory_chart(points, asked, glyphs)
    timed = with_speed(points)
    if len(timed) > 1:
        lines += [Text(), *_speed_chart(timed, asked, glyphs)]
    return lines


def _memory_chart(points: Sequence[CurvePoint], asked: int, glyphs: tuple[str, ...]) -> list[Text]:
    cells, line, *_ = glyphs
    most = max(max(point.budget.total_bytes, point.budget.limit_bytes) for point in points)
    unit, name = (GB, "GB") if most >= 10 * GB else (MB, "MB")
    top = rounded_up(most / unit)
    sums = [stacked(PARTS[: count + 1]) for count in range(len(PARTS))]

    def cell(at: float, low: float, high: float) -> tuple[str, str]:
        middle = (low + high) / 2
        limit = between(points, at, lambda point: float(point.budget.limit_bytes)) / unit
        if low < limit <= high:
            return line, "bold red"
        for glyph, style, upto in zip(cells, _STYLES, sums, strict=True):
            if between(points, at, upto) / unit > middle:
                return glyph, style
        return " ", ""

    title = f"memory of the tightest node against context ({name})"
    legend = Text(" " * _MARGIN)
    for glyph, style, what in zip(
        cells, _STYLES, ("weights", "KV", "activation", "overhead"), strict=True
    ):
        legend.append(glyph, style).append(f" {what}  ")
    legend.append(line, "bold red").append(" limit  ").append("^", "bold").append(" asked")
    return [Text(title), *_grid(top, cell), *_axis(points, asked), legend]


def _speed_chart(points: Sequence[CurvePoint], asked: int, glyphs: tuple[str, ...]) -> list[Text]:
    *_, band, dot = glyphs
    top = rounded_up(max(decode_band(point).high for point in points))

    def cell(at: float, low: float, high: float) -> tuple[str, str]:
        expected = between(points, at, lambda point: decode_band(point).expected)
        if low < expected <= high:
            return dot, "bold blue"
        least = between(points, at, lambda point: decode_band(point).low)
        most = between(points, at, lambda point: decode_band(point).high)
        return (band, "blue") if least <= (low + high) / 2 <= most else (" ", "")

    title = "predicted decode speed of one sequence against context (tokens/s)"
    legend = Text(" " * _MARGIN).append(dot, "bold blue").append(" expected  ")
    legend.append(band, "blue").append(" low to high  ").append("^", "bold").append(" asked")
    return [Text(title), *_grid(top, cell), *_axis(points, asked), legend]


def _grid(top: float, cell: Callable[[float, float, float], tuple[str, str]]) -> list[Text]:
    """Draw rows from the top down; ``cell`` returns glyph and style between two heights."""
    lines = []
    for row in reversed(range(_ROWS)):
        low, high = row * top / _ROWS, (row + 1) * top / _ROWS
        label = f"{high:,.4g}" if (row + 1) % 3 == 0 else ""
        text = Text(f"{label:>{_MARGIN - 2}} |")
        for column in range(_COLUMNS):
            glyph, style = cell(column / (_COLUMNS - 1), low, high)
            text.append(glyph, style)
        lines.append(text)
    return lines


def _axis(points: Sequence[CurvePoint], asked: int) -> list[Text]:
    """Draw the base line with the asked context, and below it as many labels as have room."""
    base = Text(f"{' ' * (_MARGIN - 1)}+")
    marked = [
        round(at * (_COLUMNS - 1))
        for at, point in zip(positions(points), points, strict=True)
        if point.context_length == asked
    ]
    for column in range(_COLUMNS):
        is_asked = column in marked
        base.append("^" if is_asked else "-", "bold" if is_asked else "")
    labels = [" "] * (_COLUMNS + 6)
    free_from = 0
    for at, point in zip(positions(points), points, strict=True):
        text = context_text(point.context_length)
        start = max(0, round(at * (_COLUMNS - 1)) - len(text) // 2)
        if start >= free_from and start + len(text) <= len(labels):
            labels[start : start + len(text)] = text
            free_from = start + len(text) + 1
    margin = " " * (_MARGIN - 1)
    return [base, Text(f"{margin} {''.join(labels).rstrip()}")]


def print_plot(points: Sequence[CurvePoint], asked: int, *, unicode: bool) -> None:
    """Print the charts of ``plot_lines`` to stdout."""
    print_text()
    for line in plot_lines(points, asked, unicode=unicode):
        print_styled(line)
