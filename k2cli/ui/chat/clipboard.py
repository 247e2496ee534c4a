"""Copying to the clipboard: of this machine, or of the one whose terminal this is."""

from __future__ import annotations

import base64
import os
import sys

from k2cli.errors import K2Error
from k2cli.ui.chat.stream import write_sequence
from k2cli.ui.output import stderr_console
from k2cli.units import format_bytes

MOST_BYTES = 74_994
"""Longest text that terminals accept: xterm and tmux limit the sequence to 100,000 characters."""

_PROGRAM_SECONDS = 5.0


def copy(text: str) -> str:
    """Copy a text; return how.

    On a Mac ``pbcopy`` is used, because its own terminal does not know OSC 52. OSC 52 is an escape
    sequence that also works over ssh and in tmux. Whether the terminal obeys it cannot be asked.

    Raises:
        K2Error: if the text is too long, or the terminal cannot do it.
    """
    data = text.encode(errors="replace")
    if sys.platform == "darwin" and not os.environ.get("SSH_CONNECTION"):
        # Its encoding is that of the locale, and without one Mac OS Roman (pbcopy(1)).
        return _by_program(["pbcopy"], data, {"LC_ALL": "en_US.UTF-8"})
    if len(data) > MOST_BYTES:
        raise K2Error(
            f"the text has {format_bytes(len(data))}, and terminals copy {MOST_BYTES:,} bytes",
            "/copy code, or /save FILE.md",
        )
    if not stderr_console().is_terminal or stderr_console().is_dumb_terminal:
        raise K2Error("a dumb terminal has no clipboard", "/save FILE.md")
    write_sequence(f"\x1b]52;c;{base64.b64encode(data).decode()}\x07")
    return "by OSC 52, if the terminal allows it"


def _by_program(command: list[str], data: bytes, settings: dict[str, str]) -> str:
    import subprocess

    environment = {**os.environ, **settings}
    try:
        subprocess.run(command, input=data, check=True, timeout=_PROGRAM_SECONDS, env=environment)
    except (OSError, subprocess.SubprocessError) as error:
        raise K2Error(f"{command[0]} failed: {error}", "/save FILE.md") from error
    return f"with {command[0]}"
