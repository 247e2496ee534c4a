"""Streamed answers on the terminal, and a status line for the state of the server.

The answer goes to stdout and everything else to stderr, so that a pipe carries the answer only,
styled only on a terminal. Control characters other than line breaks and tabs are removed, because
a model's text must not move the cursor, set the window title or write to the clipboard.
"""

from __future__ import annotations

import sys
from typing import TextIO

from rich.text import Text

from k2cli.ui.chat.markdown import MarkdownStyler
from k2cli.ui.output import stderr_console, stdout_console
from k2cli.units import clean_text, one_line

_CLEAR_LINE = "\r\x1b[2K"
_DIM, _RESET = "\x1b[2m", "\x1b[0m"


class AnswerWriter:
    """Writer of one answer to stdout, piece by piece.

    Args:
        markdown: True to style Markdown on a terminal; False for JSON, which may have its markers.
    """

    def __init__(self, stream: TextIO | None = None, *, markdown: bool = True) -> None:
        self._stream = stream or sys.stdout
        console = stdout_console()
        styled = markdown and self._stream.isatty() and console.is_terminal and not console.no_color
        self._styler = MarkdownStyler() if styled else None
        self._last = "\n"

    def write(self, text: str) -> None:
        """Write more of the answer."""
        if text := clean_text(text):
            self._last = text[-1]
            self._put(self._styler.push(text) if self._styler else text)

    def finish(self) -> None:
        """End the answer, and add a line break if it does not end with one."""
        rest = self._styler.finish() if self._styler else ""
        self._put(rest + ("" if self._last == "\n" else "\n"))

    def _put(self, text: str) -> None:
        self._stream.write(text)
        self._stream.flush()


class ReasoningWriter:
    """Writer of the reasoning before an answer: a block on stderr, dim if the terminal allows.

    It is shown only if stderr is a terminal, so that no log and no pipe gets it.
    """

    def __init__(self) -> None:
        console = stderr_console()
        self._active = console.is_terminal
        self._dim = console.is_terminal and not console.no_color
        self._open = False
        self._last = "\n"

    def write(self, text: str) -> None:
        """Write more of the reasoning."""
        if not self._active or not (text := clean_text(text)):
            return
        if not self._open:
            self._open = True
            self._put(_DIM if self._dim else "reasoning:\n")
            text = text.lstrip("\n")
        self._last = text[-1:] or self._last
        self._put(text)

    def finish(self) -> None:
        """End the block, if there is one, with a blank line before the answer."""
        if self._open:
            self._open = False
            end = _RESET if self._dim else ""
            self._put(end + ("\n" if self._last == "\n" else "\n\n"))

    @staticmethod
    def _put(text: str) -> None:
        sys.stderr.write(text)
        sys.stderr.flush()


class StatusLine:
    """One line on stderr that is rewritten in place; shown only if stderr is a terminal."""

    def __init__(self) -> None:
        self._shown = ""
        self._active = stderr_console().is_terminal

    def show(self, text: str) -> None:
        """Replace the line."""
        text = one_line(text)
        if self._active and text != self._shown:
            self._shown = text
            self._put(_CLEAR_LINE + text)

    def clear(self) -> None:
        """Erase the line."""
        if self._shown:
            self._shown = ""
            self._put(_CLEAR_LINE)

    @staticmethod
    def _put(text: str) -> None:
        sys.stderr.write(text)
        sys.stderr.flush()


def dim_note(text: str) -> None:
    """Print a line on stderr in dim style."""
    stderr_console().print(Text(one_line(text), style="dim"))
