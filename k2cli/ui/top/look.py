"""Characters and styles of the live view, and pieces of lines in a given width."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rich.text import Text

from k2cli.ui.chat.width import cut, text_width
from k2cli.units import one_line

GOOD, WARNING, BAD, LABEL, DIM = "green", "yellow", "bold red", "bold", "dim"
PARTS = ("cyan", "blue")
"""Styles of the two parts of a bar."""
_LETTERS_OF_A_NAME = 300


@dataclass(frozen=True, slots=True)
class Look:
    """The characters of a terminal: ``unicode`` or ASCII. Styles are left out later if needed."""

    unicode: bool = True

    @property
    def cells(self) -> str:
        """Cells of a bar: of two parts, and of the rest."""
        return "█▒·" if self.unicode else "#=."

    @property
    def levels(self) -> str:
        """Characters of a sparkline, from 0 to the maximum."""
        return "▁▂▃▄▅▆▇█" if self.unicode else "_.-:=+*#"

    @property
    def up(self) -> str:
        """Sign for lines above the shown ones."""
        return "↑" if self.unicode else "^"

    @property
    def down(self) -> str:
        """Sign for lines below the shown ones."""
        return "↓" if self.unicode else "v"

    def bar(self, parts: Sequence[int], whole: int, width: int, styles: Sequence[str]) -> Text:
        """Draw a bar of two parts; one above the whole fills it and is marked.

        A part that is not 0 has at least one cell if there is one for it.
        """
        line = Text()
        over = sum(parts) > whole > 0
        position = total = 0
        for part, cell, style in zip(parts, self.cells, styles, strict=False):
            total += part
            end = min(width, round(total / whole * width)) if whole > 0 else 0
            if part and whole > 0:
                end = min(width, max(end, position + 1))
            line.append(cell * (end - position), BAD if over else style)
            position = max(position, end)
        return line.append(self.cells[-1] * (width - position), DIM)

    def sparkline(self, values: Sequence[float | None], highest: float) -> str:
        """Draw values as columns of heights up to ``highest``; spaces stand for None."""
        return "".join(" " if v is None else self.levels[self._level(v, highest)] for v in values)

    def _level(self, value: float, highest: float) -> int:
        if value <= 0 or highest <= 0:
            return 0
        top = len(self.levels) - 1
        return min(top, max(1, round(value / highest * top)))


def name(text: str) -> str:
    """Return a foreign name without what could control a terminal, and not too long to draw."""
    return one_line(text[:_LETTERS_OF_A_NAME])


def packed(parts: Iterable[Text | str], width: int, separator: str = ", ") -> list[Text]:
    """Put parts on as few lines as the width allows; one that is too long alone is cut."""
    lines: list[Text] = []
    for part in parts:
        piece = part if isinstance(part, Text) else Text(part)
        if text_width(piece.plain) > width:
            piece = Text(cut(piece.plain, width), piece.style)
        room = width - (text_width(lines[-1].plain) if lines else width)
        if lines and text_width(separator) + text_width(piece.plain) <= room:
            lines[-1].append(separator).append_text(piece)
            continue
        if lines and separator.rstrip() and len(separator.rstrip()) <= room:
            lines[-1].append(separator.rstrip())
        lines.append(Text().append_text(piece))
    return lines


def wrapped(text: str, width: int, most_lines: int, style: str = "") -> list[Text]:
    """Wrap a text at its spaces; the last line that is allowed is cut."""
    lines = packed(text.split(" ")[:_LETTERS_OF_A_NAME], width, " ")
    if len(lines) > most_lines:
        rest = " ".join(line.plain for line in lines[most_lines - 1 :])
        lines = [*lines[: most_lines - 1], Text(cut(rest, width))]
    return [Text(line.plain, style) for line in lines]


def rate_text(rate: float) -> str:
    """Return tokens per second."""
    return f"{max(0.0, rate):,.1f}"


def percent_text(part: int, whole: int) -> str:
    """Return a share; ``-`` of nothing."""
    return f"{part / whole * 100:.0f} %" if whole > 0 else "-"


def age_text(seconds: float | None) -> str:
    """Return a duration in as few characters as possible: ``12 s``, ``4:05``, ``2:03:10``."""
    if seconds is None:
        return "-"
    whole = max(0, int(seconds))
    if whole < 100:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def without_style(line: Text) -> Text:
    """Return a line without colours, bold and dim, for NO_COLOR."""
    return Text(line.plain)
