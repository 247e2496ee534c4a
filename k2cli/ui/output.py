"""The two consoles and the plain ways to print: data to stdout, everything else to stderr.

Rich decides per stream whether it is a terminal and honours ``NO_COLOR``; nothing here forces
colour or width, so that a pipe receives plain text. Plain text to a pipe does without rich, whose
import takes a launch 30 ms.
"""

from __future__ import annotations

import functools
import os
import sys
from typing import TYPE_CHECKING, Any

import msgspec

from k2cli.errors import K2Error

if TYPE_CHECKING:
    from rich.console import Console


_TERMINAL_SETTINGS = ("FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE")
"""With which rich may take for a terminal what is none."""


def stderr_is_plain() -> bool:
    """Whether stderr is no terminal beyond doubt, so that rich would change nothing."""
    return not sys.stderr.isatty() and not any(name in os.environ for name in _TERMINAL_SETTINGS)


@functools.cache
def stdout_console() -> Console:
    """For results."""
    from rich.console import Console

    return Console(highlight=False, soft_wrap=True)


@functools.cache
def stderr_console() -> Console:
    """For progress, notes, hints and errors."""
    from rich.console import Console

    return Console(stderr=True, highlight=False, soft_wrap=True)


def print_json(document: bytes | Any) -> None:
    """Write one JSON document to stdout; anything but bytes is encoded first, indented."""
    if not isinstance(document, bytes):
        document = msgspec.json.format(msgspec.json.encode(document), indent=1)
    sys.stdout.write(document.decode().rstrip("\n") + "\n")
    sys.stdout.flush()


def print_json_line(document: Any) -> None:
    """Write one JSON document to stdout as a single line, for JSON Lines."""
    sys.stdout.write(msgspec.json.encode(document).decode() + "\n")
    sys.stdout.flush()


def print_text(text: str = "", *, end: str = "\n") -> None:
    """Write a result to stdout as it is: no markup, no wrapping."""
    sys.stdout.write(text + end)
    sys.stdout.flush()


def note(text: str) -> None:
    """Tell the user something on stderr."""
    if stderr_is_plain():
        sys.stderr.write(text + "\n")
        sys.stderr.flush()
        return
    stderr_console().print(text, markup=False)


def warn(text: str) -> None:
    """Warn on stderr."""
    stderr_console().print(f"warning: {text}", markup=False, style="yellow")


def print_error(error: K2Error) -> None:
    """Show a failure on stderr, with its hint."""
    stderr_console().print(f"error: {error.message}", markup=False, style="bold red")
    if error.hint:
        stderr_console().print(f"\nhint: {error.hint}", markup=False)
