"""Streamed answers on the terminal, and a status line for what happens meanwhile.

The answer goes to stdout and everything else to stderr, so that a pipe carries the answer only, as
the model wrote it. On a terminal its Markdown is rendered; without colours (``NO_COLOR``) and on a
dumb terminal its lines are only wrapped, and nothing is rewritten in place. Control characters
other than line breaks and tabs are removed, because a model's text must not move the cursor, set
the window title or write to the clipboard.
"""

from __future__ import annotations

import os
import stat
import sys
import threading
import time
from collections.abc import Callable
from typing import TextIO

from rich.text import Text

from k2cli.ui.chat.markdown import DIM, MarkdownRenderer
from k2cli.ui.chat.width import cut
from k2cli.ui.chat.wrap import Wrapper, wrap
from k2cli.ui.output import stderr_console, stdout_console
from k2cli.units import clean_piece, one_line

_CLEAR_LINE = "\r\x1b[2K"
_REDRAW_SECONDS = 0.25
_FIRST_LINE_SECONDS = 2.0
_SECONDS_BETWEEN_LINES = 10.0
_DEFAULT_COLUMNS = 80


def columns_of(stream: TextIO) -> int:
    """Return the current width of the terminal that a stream writes to."""
    try:
        columns = os.get_terminal_size(stream.fileno()).columns
    except (OSError, ValueError):
        columns = 0
    return columns or _DEFAULT_COLUMNS


def may_style(stream: TextIO) -> bool:
    """True if escape sequences and lines may be drawn: on a terminal with colours and UTF-8."""
    if not (stream.encoding or "").lower().startswith("utf"):
        return False
    console = stdout_console() if stream is sys.stdout else stderr_console()
    capable = console.is_terminal and not console.is_dumb_terminal and not console.no_color
    return stream.isatty() and capable


def _is_file(stream: TextIO) -> bool:
    try:
        return stat.S_ISREG(os.fstat(stream.fileno()).st_mode)
    except (OSError, ValueError):
        return False


class AnswerWriter:
    """Writer of one answer, piece by piece.

    Args:
        stream: a terminal, a file or a pipe; stdout if it is not given.
        markdown: False to write the text as it is to a terminal, too: JSON may have its markers.
    """

    def __init__(self, stream: TextIO | None = None, *, markdown: bool = True) -> None:
        self._stream = stream or sys.stdout
        self._renderer: MarkdownRenderer | None = None
        if markdown and self._stream.isatty() and stdout_console().is_terminal:
            self._renderer = MarkdownRenderer(
                lambda: columns_of(self._stream), styled=may_style(self._stream)
            )
        self._last = "\n"
        self.beside_status = _is_file(self._stream)
        """True if a status line cannot mix with the answer, because that goes to a file."""

    @property
    def waiting_for(self) -> str:
        """Name the part of the answer that is held back; "" if none is."""
        return self._renderer.waiting_for if self._renderer else ""

    def render(self, text: str) -> str:
        """Add text; return what is to be written now."""
        text = clean_piece(text)
        if self._renderer is not None:
            return self._renderer.push(text)
        self._last = text[-1:] or self._last
        return text

    def put(self, output: str) -> None:
        """Write what ``render`` returned."""
        if output:
            self._stream.write(output)
            self._stream.flush()

    def write(self, text: str) -> None:
        """Write more of the answer."""
        self.put(self.render(text))

    def finish(self) -> None:
        """End the answer, and add a line break if it does not end with one."""
        if self._renderer is not None:
            self.put(self._renderer.finish())
        else:
            self.put("" if self._last == "\n" else "\n")
            self._last = "\n"


class ReasoningWriter:
    """Writer of the reasoning before an answer: a block on stderr, dim if the terminal allows.

    It is shown only if stderr is a terminal, so that no log and no pipe gets it.
    """

    def __init__(self) -> None:
        self._active = stderr_console().is_terminal
        self._dim = may_style(sys.stderr)
        self._wrapper = Wrapper(lambda: columns_of(sys.stderr), styled=self._dim)
        self._open = False

    def write(self, text: str) -> None:
        """Write more of the reasoning."""
        text = clean_piece(text)
        if not self._active or not (text if self._open else (text := text.lstrip("\n"))):
            return
        if not self._open and not self._dim:
            _put("reasoning:\n")
        self._open = True
        first, *others = text.split("\n")
        self._wrapper.feed(first, DIM)
        for line in others:
            self._wrapper.end_line()
            self._wrapper.feed(line, DIM)
        _put(self._wrapper.take())

    def finish(self) -> None:
        """End the block, if there is one, with a blank line before the answer."""
        if self._open:
            self._open = False
            if self._wrapper.inside_line:
                self._wrapper.end_line()
            self._wrapper.write_line([])
            _put(self._wrapper.take())


class StatusLine:
    """One line on stderr that is rewritten in place; shown only if stderr is a terminal.

    A line that is given as a function is asked for again four times a second, so that times go on
    while nothing arrives. Where nothing may be rewritten, the line is printed after two seconds of
    waiting and then every ten.
    """

    def __init__(self) -> None:
        self._active = stderr_console().is_terminal
        self._in_place = may_style(sys.stderr)
        self._lock = threading.Lock()
        self._source: Callable[[], str] | None = None
        self._shown = ""
        self._next_line_seconds = 0.0
        self._ticking: threading.Thread | None = None

    def show(self, text: str | Callable[[], str]) -> None:
        """Replace the line."""
        if not self._active:
            return
        with self._lock:
            if self._source is None:
                self._next_line_seconds = time.monotonic() + _FIRST_LINE_SECONDS
            self._source = text if callable(text) else lambda: text
            self._draw()
            if self._ticking is None:
                self._ticking = threading.Thread(target=self._tick, daemon=True)
                self._ticking.start()

    def clear(self) -> None:
        """Erase the line."""
        if self._source is None:
            return
        with self._lock:
            self._source = None
            if self._shown and self._in_place:
                _put(_CLEAR_LINE)
            self._shown = ""

    def _tick(self) -> None:
        while True:
            time.sleep(_REDRAW_SECONDS)
            with self._lock:
                if self._source is None:
                    self._ticking = None
                    return
                self._draw()

    def _draw(self) -> None:
        assert self._source is not None
        text = one_line(self._source())
        if self._in_place:
            text = cut(text, columns_of(sys.stderr) - 1)
            if text != self._shown:
                _put(f"{_CLEAR_LINE}\x1b[{DIM}m{text}\x1b[0m")
                self._shown = text
        elif text != self._shown and time.monotonic() >= self._next_line_seconds:
            self._next_line_seconds = time.monotonic() + _SECONDS_BETWEEN_LINES
            self._shown = text
            _put(f"{text}\n")


def _put(text: str) -> None:
    if text:
        sys.stderr.write(text)
        sys.stderr.flush()


def write_sequence(sequence: str) -> None:
    """Write an escape sequence of k2's own to the terminal."""
    _put(sequence)


def dim_note(text: str) -> None:
    """Print a line on stderr in dim style, wrapped to the width of a terminal."""
    stderr_console().print(Text(wrapped(one_line(text)), style="dim"))


def wrapped(text: str, indent: int = 0) -> str:
    """Wrap the lines of a text to the width of stderr, if that is a terminal.

    Args:
        indent: columns of space before the lines that a wrap begins.
    """
    if not stderr_console().is_terminal:
        return text
    columns = columns_of(sys.stderr)
    indent = indent if indent < columns / 2 else 2
    lines = []
    for line in text.split("\n"):
        first, *others = wrap(line, columns, divide=False)
        lines.append(first)
        if others:
            rest = " ".join(others)
            parts = wrap(rest, columns - indent, divide=False)
            lines += [" " * indent + part for part in parts]
    return "\n".join(lines)
