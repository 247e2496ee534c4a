"""Consoles and print functions: data goes to stdout, everything else to stderr.

Rich detects per stream if it is a terminal, and obeys ``NO_COLOR``. No colour or width is forced,
so a pipe receives plain text. Plain text to a pipe is written without rich, because importing it
would delay a launch by 30 ms.
"""

from __future__ import annotations

import functools
import os
import re
import sys
from typing import TYPE_CHECKING, Any, Literal

from k2cli.errors import K2Error
from k2cli.files import encode_json
from k2cli.units import clean_text, escape_json, one_line

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text


_FIRST_LINE = re.compile(r"(\n*)([^\n]*)(.*)", re.DOTALL)
_TERMINAL_SETTINGS = ("FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE")
"""Environment variables that can make rich treat any stream as a terminal."""


def stderr_is_plain() -> bool:
    """Return True if rich would certainly not treat stderr as a terminal."""
    return not sys.stderr.isatty() and not any(name in os.environ for name in _TERMINAL_SETTINGS)


@functools.cache
def stdout_console() -> Console:
    """Return the console for results."""
    return _console(stderr=False)


@functools.cache
def stderr_console() -> Console:
    """Return the console for progress, notes, hints and errors."""
    return _console(stderr=True)


def _console(*, stderr: bool) -> Console:
    from rich.console import Console

    # With NO_COLOR rich itself leaves out colours alone, and still writes bold and dim.
    colours: Literal["auto"] | None = None if os.environ.get("NO_COLOR") else "auto"
    return Console(
        stderr=stderr, color_system=colours, highlight=False, soft_wrap=True, emoji=False
    )


def print_json(document: bytes | Any) -> None:
    """Print one JSON document to stdout; a value other than bytes is encoded with indentation."""
    if not isinstance(document, bytes):
        document = encode_json(document)
    sys.stdout.write(escape_json(document.decode()).rstrip("\n") + "\n")
    sys.stdout.flush()


def print_json_line(document: Any) -> None:
    """Print one JSON document to stdout on a single line, for JSON Lines."""
    sys.stdout.write(escape_json(encode_json(document, indent=False).decode()))
    sys.stdout.flush()


def print_text(text: str = "", *, end: str = "\n") -> None:
    """Print a result to stdout without control characters: no markup, no wrapping."""
    sys.stdout.write(clean_text(text) + end)
    sys.stdout.flush()


def print_line(text: str) -> None:
    """Print a result that may contain foreign names, on one line whatever they contain."""
    print_text(one_line(text))


def print_styled(line: Text) -> None:
    """Print a styled line to stdout; one with characters that do not belong there gets no style."""
    clean = one_line(line.plain)
    stdout_console().print(line if clean == line.plain else clean, markup=False)


def print_prompt(text: str) -> None:
    """Print a prompt on the terminal, on the stream that is one."""
    stream = sys.stdout if sys.stdout.isatty() else sys.stderr
    stream.write(text)
    stream.flush()


def note(text: str) -> None:
    """Print a message on stderr; lines after its first are indented."""
    text = _indented(text)
    if stderr_is_plain():
        sys.stderr.write(text + "\n")
        sys.stderr.flush()
        return
    stderr_console().print(text, markup=False)


def _indented(text: str) -> str:
    """Indent continuation lines, so that a line break in a name cannot begin a false message."""
    before, first, rest = _FIRST_LINE.fullmatch(clean_text(text)).groups()  # type: ignore[union-attr]
    return before + first + re.sub(r"\n(?=[^ \n])", "\n  ", rest)


def warn(text: str) -> None:
    """Print a warning on stderr."""
    stderr_console().print(f"warning: {_indented(text)}", markup=False, style="yellow")


def print_error(error: K2Error) -> None:
    """Print an error on stderr, with its hint."""
    stderr_console().print(f"error: {_indented(error.message)}", markup=False, style="bold red")
    if error.hint:
        stderr_console().print(f"\nhint: {_indented(error.hint)}", markup=False)
