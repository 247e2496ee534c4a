"""Answers on the terminal as they come, and the line that says what the server is doing.

The answer goes to stdout and everything else to stderr, so that a pipe carries the answer only:
plain, byte for byte what the model wrote. On a terminal it is styled, and control characters are
taken out, since a model's text must not be able to move the cursor or set the window title.
"""

from __future__ import annotations

import sys
from typing import TextIO

from rich.text import Text

from k2cli.ui.markdown import MarkdownStyler
from k2cli.ui.output import stderr_console, stdout_console

_CONTROL = {code: None for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}
_CLEAR_LINE = "\r\x1b[2K"


class AnswerWriter:
    """Writes one answer to stdout, piece by piece."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stdout
        console = stdout_console()
        self._terminal = self._stream.isatty()
        styled = self._terminal and console.is_terminal and not console.no_color
        self._styler = MarkdownStyler() if styled else None
        self._last = "\n"

    def write(self, text: str) -> None:
        """More of the answer."""
        if self._terminal:
            text = text.translate(_CONTROL)
        if text:
            self._last = text[-1]
            self._put(self._styler.push(text) if self._styler else text)

    def finish(self) -> None:
        """End the answer, with a line break if it has none."""
        rest = self._styler.finish() if self._styler else ""
        self._put(rest + ("" if self._last == "\n" else "\n"))

    def _put(self, text: str) -> None:
        self._stream.write(text)
        self._stream.flush()


class StatusLine:
    """One line on stderr that is replaced in place, and only where stderr is a terminal."""

    def __init__(self) -> None:
        self._shown = ""
        self._active = stderr_console().is_terminal

    def show(self, text: str) -> None:
        """Replace the line."""
        if self._active and text != self._shown:
            self._shown = text
            self._put(_CLEAR_LINE + text)

    def clear(self) -> None:
        """Take the line away."""
        if self._shown:
            self._shown = ""
            self._put(_CLEAR_LINE)

    @staticmethod
    def _put(text: str) -> None:
        sys.stderr.write(text)
        sys.stderr.flush()


def dim_note(text: str) -> None:
    """A line of figures on stderr that need not catch the eye."""
    stderr_console().print(Text(text, style="dim"))
