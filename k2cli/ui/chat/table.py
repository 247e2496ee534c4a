"""Tables of Markdown, laid out for the width of the terminal."""

from __future__ import annotations

import re
from collections.abc import Iterator

from k2cli.ui.chat.inline import BOLD, Fragment, styled_fragments
from k2cli.ui.chat.width import text_width
from k2cli.ui.chat.wrap import wrap

MOST_ROWS = 200
"""Rows that are held back; the rows after these are laid out anew."""

_DELIMITER = re.compile(r"\|?\s*:?-+:?\s*(\|\s*:?-+:?\s*)*\|?\s*")
_UNESCAPED_BAR = re.compile(r"(?<!\\)\|")
_LEAST_COLUMNS = 6
_MOST_CELLS = 64
_DIM = "2"


def is_delimiter(line: str) -> bool:
    """True if a line is the one below the head of a table, such as ``|---|:-:|``."""
    return len(line) < 1000 and _DELIMITER.fullmatch(line) is not None and "-" in line


def cells(line: str) -> list[str]:
    """Divide a row into the texts of its cells."""
    inner = line.strip().removeprefix("|")
    if inner.endswith("|") and not inner.endswith("\\|"):
        inner = inner[:-1]
    return [part.strip().replace("\\|", "|") for part in _UNESCAPED_BAR.split(inner)][:_MOST_CELLS]


class TableLines:
    """One table whose rows arrive line by line."""

    def __init__(self, head: str, delimiter: str, *, styled: bool) -> None:
        self._head = cells(head)
        self._alignments = [_alignment(cell) for cell in cells(delimiter)]
        self._styled = styled
        self._rows: list[list[str]] = []
        self._head_shown = False
        self.rows = 0

    def add(self, line: str) -> None:
        """Add a row; missing cells are empty, and those too many are joined to the last one."""
        count = len(self._head)
        row = cells(line)
        if len(row) > count:
            row = [*row[: count - 1], " | ".join(row[count - 1 :])]
        self._rows.append(row + [""] * (count - len(row)))
        self.rows += 1

    @property
    def is_full(self) -> bool:
        """True if as many rows are held back as may be."""
        return len(self._rows) >= MOST_ROWS

    def take(self, columns: int) -> list[list[Fragment]]:
        """Return the lines of the rows so far, for a room of that width, and forget the rows."""
        rows, self._rows = self._rows, []
        first, self._head_shown = not self._head_shown, True
        head = [self._cell(text, BOLD) for text in self._head]
        body = [[self._cell(text) for text in row] for row in rows]
        widths = _widths([head, *body], columns)
        if widths is None:
            return list(self._as_records(head, body, columns))
        return list(self._as_grid(head if first else None, body, widths))

    def _cell(self, text: str, base: str = "") -> list[Fragment]:
        return styled_fragments(text, base) if self._styled else [(text, "")]

    def _as_grid(
        self,
        head: list[list[Fragment]] | None,
        body: list[list[list[Fragment]]],
        widths: list[int],
    ) -> Iterator[list[Fragment]]:
        if head is not None:
            yield from self._grid_lines(head, widths)
            rule = "─┼─" if self._styled else "-|-"
            yield [(rule.join(rule[0] * width for width in widths), _DIM)]
        for row in body:
            yield from self._grid_lines(row, widths)

    def _grid_lines(self, row: list[list[Fragment]], widths: list[int]) -> Iterator[list[Fragment]]:
        wrapped = [_wrapped(cell, width) for cell, width in zip(row, widths, strict=True)]
        bar = (" │ " if self._styled else " | ", _DIM)
        for number in range(max(len(lines) for lines in wrapped)):
            line: list[Fragment] = []
            for index, (lines, width) in enumerate(zip(wrapped, widths, strict=True)):
                cell = lines[number] if number < len(lines) else []
                last = index == len(widths) - 1
                line += [*([bar] if index else []), *self._aligned(cell, width, index, last)]
            yield line

    def _aligned(self, cell: list[Fragment], width: int, index: int, last: bool) -> list[Fragment]:
        space = max(0, width - text_width(_plain(cell)))
        left = {"right": space, "center": space // 2}.get(self._alignments[index], 0)
        if last and not _plain(cell):
            return []
        right = 0 if last else space - left
        return [(" " * left, ""), *cell, (" " * right, "")]

    def _as_records(
        self, head: list[list[Fragment]], body: list[list[list[Fragment]]], columns: int
    ) -> Iterator[list[Fragment]]:
        """Yield each cell on a line of its own, where columns beside one another do not fit."""
        for row in body:
            for name, cell in zip(head, row, strict=True):
                yield from _wrapped([*name, (": ", BOLD if self._styled else ""), *cell], columns)
            yield [(("─" if self._styled else "-") * min(columns, 20), _DIM)]


def _alignment(cell: str) -> str:
    if cell.endswith(":"):
        return "center" if cell.startswith(":") else "right"
    return "left"


def _plain(cell: list[Fragment]) -> str:
    return "".join(text for text, _ in cell)


def _widths(rows: list[list[list[Fragment]]], columns: int) -> list[int] | None:
    """Return the widths of columns: those of their texts, the widest ones reduced to fit.

    Returns None if even narrow columns do not fit.
    """
    widths = [
        max(1, *(text_width(_plain(cell)) for cell in column)) for column in zip(*rows, strict=True)
    ]
    room = columns - 3 * (len(widths) - 1)
    if sum(min(width, _LEAST_COLUMNS) for width in widths) > room:
        return None
    limit = max(widths)
    while sum(min(width, limit) for width in widths) > room:
        limit -= 1
    fitted = [min(width, limit) for width in widths]
    for index, width in enumerate(widths):  # what rounding left goes to the first that can use it
        fitted[index] += min(width - fitted[index], room - sum(fitted))
    return fitted


def _wrapped(cell: list[Fragment], columns: int) -> list[list[Fragment]]:
    """Break the text of a cell into lines, each with its styles."""
    styles = [style for text, style in cell for _ in text]
    plain = _plain(cell)
    lines: list[list[Fragment]] = []
    position = 0
    for line in wrap(plain, columns):
        while line and plain[position] != line[0]:
            position += 1  # spaces at the break
        lines.append(_restyled(line, styles[position : position + len(line)]))
        position += len(line)
    return lines


def _restyled(line: str, styles: list[str]) -> list[Fragment]:
    fragments: list[Fragment] = []
    for character, style in zip(line, styles, strict=True):
        if fragments and fragments[-1][1] == style:
            fragments[-1] = (fragments[-1][0] + character, style)
        else:
            fragments.append((character, style))
    return fragments
