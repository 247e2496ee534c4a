"""A table that fits any width: columns shrink, and the least important ones are left out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rich.text import Text

from k2cli.ui.chat.width import cut, text_width

_GAP = 2


@dataclass(frozen=True, slots=True)
class Column:
    """One column.

    Attributes:
        title: its heading.
        draw: returns the cells for a width, which they must not exceed.
        least: the smallest width with which it makes sense.
        most: the largest width of which it makes use.
        importance: columns of the lowest importance are left out first.
        right: aligns its cells to the right.
        bar: draws bars, which take the width that texts do not need.
    """

    title: str
    draw: Callable[[int], Sequence[Text]]
    least: int
    most: int
    importance: int
    right: bool = False
    bar: bool = False


def text_column(
    title: str,
    cells: Sequence[Text | str],
    importance: int,
    *,
    right: bool = False,
    least: int | None = None,
) -> Column:
    """Return a column of texts; those wider than ``least`` may be cut, if it is given."""
    texts = [cell if isinstance(cell, Text) else Text(cell) for cell in cells]
    natural = max([text_width(title), *(text_width(text.plain) for text in texts)])

    def draw(width: int) -> list[Text]:
        return [
            text if text_width(text.plain) <= width else Text(cut(text.plain, width), text.style)
            for text in texts
        ]

    shrunk = natural if least is None else max(text_width(title), min(natural, least))
    return Column(title, draw, shrunk, natural, importance, right)


def table(columns: Sequence[Column], width: int, title_style: str) -> list[Text]:
    """Return the heading and the rows of a table in a width."""
    shown = list(columns)
    while len(shown) > 1 and _least_width(shown) > width:
        shown.remove(min(shown, key=lambda column: column.importance))
    widths = _widths(shown, width)
    rows = [
        [Text(cut(column.title, size), title_style), *column.draw(size)]
        for column, size in zip(shown, widths, strict=True)
    ]
    return [
        _line(cells, widths, [column.right for column in shown])
        for cells in zip(*rows, strict=True)
    ]


def _least_width(columns: Sequence[Column]) -> int:
    return sum(column.least for column in columns) + _GAP * (len(columns) - 1)


def _widths(columns: Sequence[Column], width: int) -> list[int]:
    """Give each column its least width, and the rest to texts before bars."""
    if len(columns) == 1:
        return [max(0, min(columns[0].most, width))]
    free = width - _least_width(columns)
    widths = [column.least for column in columns]
    for bars in (False, True):
        wishes = [column.most - column.least if column.bar is bars else 0 for column in columns]
        total = sum(wishes)
        given = [wish if total <= free else free * wish // total for wish in wishes]
        widths = [size + more for size, more in zip(widths, given, strict=True)]
        free -= sum(given)
    return widths


def _line(cells: Sequence[Text], widths: Sequence[int], right: Sequence[bool]) -> Text:
    line = Text()
    for index, (cell, width, to_right) in enumerate(zip(cells, widths, right, strict=True)):
        if index:
            line.append(" " * _GAP)
        padding = " " * (width - text_width(cell.plain))
        if to_right:
            line.append(padding)
        line.append_text(cell)
        if not to_right:
            line.append(padding)
    line.rstrip()
    return line
