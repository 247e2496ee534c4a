"""Placement of a stream of styled text on the lines of a terminal, word by word.

A word is written once it is complete, after a line break if it does not fit. Nothing that was
written is changed. The width is asked for at each word, so that a terminal may be resized in the
middle of an answer.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from k2cli.ui.chat.width import JOINER, character_width, clusters, extends, text_width

# Characters from U+1100 on may be wide, and are looked at one by one.
_PARTS = re.compile("[ \t]+|[^ \t\u1100-\U0010ffff]+|.", re.DOTALL)
_NO_LINE_START = frozenset("，。、：；！？）」』】》〉”’…—～%,.;:!?)]}")
_NO_LINE_END = frozenset("（「『【《〈“‘([{")
_LEAST_COLUMNS = 10


class Wrapper:
    """Writer of words to lines; ``take`` returns what is to be sent to the terminal.

    Args:
        columns: returns the current width of the terminal.
        styled: False to write no escape sequences.
    """

    def __init__(self, columns: Callable[[], int], *, styled: bool) -> None:
        self._columns = columns
        self._styled = styled
        self._output: list[str] = []
        self._word: list[tuple[str, str]] = []
        self._last = ""
        self._gap = 0
        self._style = ""
        self._begun = False
        self._prefix: tuple[tuple[str, str], ...] = ()
        self._hang: tuple[tuple[str, str], ...] = ()
        self._column = 0
        self._text_column = 0

    def begin(self, prefix: tuple[tuple[str, str], ...], hang: tuple[tuple[str, str], ...]) -> None:
        """Set what precedes the next line, and the lines after it that a wrap begins.

        Each part is a text and its style.
        """
        self._prefix, self._hang = prefix, hang
        self._begun = False

    def feed(self, text: str, style: str = "") -> None:
        """Add text without line breaks; complete words are written."""
        for match in _PARTS.finditer(text):
            part = match.group()
            if part[0] in " \t":
                self._end_word()
                self._gap += len(part)
                continue
            if self._last and _may_break(self._last, part[0]):
                self._end_word()
            self._word.append((part, style))
            self._last = part[-1]

    def end_line(self) -> None:
        """Write the word that is waiting, and end the line."""
        self._end_word()
        self._open_line()
        self._new_line()
        self._begun = False

    def write_line(self, parts: list[tuple[str, str]]) -> None:
        """Write one whole line as it is; the terminal breaks it if it is too long."""
        self._open_line()
        for text, style in parts:
            self._put(text, style)
        self._new_line()
        self._begun = False

    def room(self) -> int:
        """Return the columns between the prefix and the end of the line, at least 10."""
        used = sum(text_width(text) for text, _ in self._prefix)
        return max(_LEAST_COLUMNS, self._columns() - used)

    @property
    def inside_line(self) -> bool:
        """True if a line has begun, or a word waits for it."""
        return self._begun or bool(self._word)

    def take(self) -> str:
        """Return the output since the last call."""
        output = "".join(self._output)
        self._output.clear()
        return output

    def _end_word(self) -> None:
        if not self._word:
            return
        word = "".join(text for text, _ in self._word)
        width, columns = text_width(word), self._columns()
        if not self._begun:
            self._open_line()
        elif self._column + self._gap + width > columns and self._column > self._text_column:
            self._new_line()
            self._start(self._fitting(self._hang))
        if self._gap and self._column > self._text_column:
            first_style = self._word[0][1]
            self._put(" " * self._gap, first_style if first_style == self._style else "")
            self._column += self._gap
        self._gap = 0
        for text, style in self._word:
            self._put(text, style)
        self._advance(word, width, columns)
        self._word.clear()
        self._last = ""

    def _advance(self, word: str, width: int, columns: int) -> None:
        if self._column + width <= columns:
            self._column += width
            return
        # The terminal itself breaks a word that is longer than a line, so that it can be copied.
        for _, cluster_width in clusters(word):
            over = self._column + cluster_width > columns
            self._column = cluster_width if over else self._column + cluster_width

    def _open_line(self) -> None:
        if not self._begun:
            self._begun = True
            self._start(self._prefix)

    def _start(self, prefix: tuple[tuple[str, str], ...]) -> None:
        self._column = 0
        for text, style in prefix:
            self._put(text, style)
            self._column += text_width(text)
        self._text_column = self._column
        self._gap = 0

    def _fitting(self, prefix: tuple[tuple[str, str], ...]) -> tuple[tuple[str, str], ...]:
        """Return what precedes a wrapped line, or nothing if it would leave no room for words."""
        used = sum(text_width(text) for text, _ in prefix)
        return prefix if used + _LEAST_COLUMNS <= self._columns() else ()

    def _new_line(self) -> None:
        self._set_style("")
        self._output.append("\n")
        self._column = self._text_column = self._gap = 0

    def _put(self, text: str, style: str) -> None:
        if text:
            self._set_style(style)
            self._output.append(text)

    def _set_style(self, style: str) -> None:
        if self._styled and style != self._style:
            reset = "\x1b[0m" if self._style else ""
            self._output.append(reset + (f"\x1b[{style}m" if style else ""))
            self._style = style


def _may_break(before: str, after: str) -> bool:
    """True if a line may end between two characters that have no space between them."""
    if extends(after) or before == JOINER:
        return False
    if after in _NO_LINE_START or before in _NO_LINE_END:
        return False
    return character_width(before) == 2 or character_width(after) == 2


def wrap(text: str, columns: int, *, divide: bool = True) -> list[str]:
    """Break a text into lines of at most ``columns``.

    Args:
        divide: True to divide longer words; else the terminal does, so that they can be copied.
    """
    lines: list[str] = []
    line, used, gap, word = "", 0, 0, ""

    def place(word: str) -> None:
        nonlocal line, used, gap
        if not word:
            return
        width = text_width(word)
        if line and used + gap + width > columns:
            lines.append(line)
            line, used, gap = "", 0, 0
        if line:
            line, used = line + " " * gap, used + gap
        gap = 0
        for cluster, cluster_width in clusters(word):
            if divide and line and used + cluster_width > columns:
                lines.append(line)
                line, used = "", 0
            line, used = line + cluster, used + cluster_width

    for match in _PARTS.finditer(text):
        part = match.group()
        if part[0] in " \t":
            place(word)
            word, gap = "", gap + len(part)
        elif word and _may_break(word[-1], part[0]):
            place(word)
            word = part
        else:
            word += part
    place(word)
    return [*lines, line] if line or not lines else lines
