"""A k2 process on a pseudo-terminal whose screen is read as text.

The screen is that of ``pyte``, a terminal emulator. Lines that were scrolled out are kept.
"""

from __future__ import annotations

import fcntl
import os
import pty
import select
import struct
import subprocess
import sys
import termios
import time
import unicodedata
from collections.abc import Callable
from typing import Any

import pyte
from wcwidth import wcwidth

SECONDS = 20.0
PASTE_BEGIN, PASTE_END = "\x1b[200~", "\x1b[201~"


class _Screen(pyte.HistoryScreen):
    """Screen that knows dim text, and leaves out characters that draw nothing.

    ``pyte`` itself has no dim style, and drops the text after such characters.
    """

    def select_graphic_rendition(self, *attributes: int) -> None:
        if not {38, 48} & set(attributes):  # colours by number
            attributes = tuple(90 if attribute == 2 else attribute for attribute in attributes)
        super().select_graphic_rendition(*attributes)

    def draw(self, data: str) -> None:
        super().draw("".join(c for c in data if wcwidth(c) or unicodedata.combining(c)))


class Terminal:
    """A terminal of a size in which one command of k2 runs."""

    def __init__(self, *arguments: str, columns: int = 80, rows: int = 24, **environment: str):
        self._main, side = pty.openpty()
        self._resize(columns, rows)
        self.screen = _Screen(columns, rows, history=20_000, ratio=0.5)
        # prompt_toolkit asks where the cursor is.
        self.screen.write_process_input = lambda data: os.write(self._main, data.encode())
        self._stream = pyte.ByteStream(self.screen)
        self.raw = ""
        variables = {**os.environ, "TERM": "xterm-256color"}
        variables.pop("COLUMNS", None)
        variables.update(environment)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "k2cli", *arguments],
            stdin=side,
            stdout=side,
            stderr=side,
            env=variables,
            start_new_session=True,
            # Makes the terminal the controlling one, so that Ctrl-C becomes a signal.
            preexec_fn=_take_terminal,
        )
        os.close(side)

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *exception: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait(10)
        os.close(self._main)

    def type(self, text: str) -> None:
        """Write all of a text, and read meanwhile, because the terminal's buffer is small."""
        data = text.encode()
        while data:
            data = data[os.write(self._main, data[:512]) :]
            self._read(0)

    def enter(self, text: str) -> None:
        """Type a line."""
        self.type(f"{text}\r")

    def paste(self, text: str) -> None:
        """Paste a text as terminals do that know bracketed paste."""
        self.type(PASTE_BEGIN + text.replace("\n", "\r") + PASTE_END)

    def resize(self, columns: int, rows: int = 24) -> None:
        """Change the size of the window."""
        self._resize(columns, rows)
        self.screen.resize(rows, columns)

    def _resize(self, columns: int, rows: int) -> None:
        fcntl.ioctl(self._main, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    @property
    def lines(self) -> list[str]:
        """Every line from the first, without spaces and empty lines at the end."""
        above = ["".join(line[x].data for x in range(self.screen.columns)) for line in self._above]
        lines = [line.rstrip() for line in (*above, *self.screen.display)]
        while lines and not lines[-1]:
            lines.pop()
        return lines

    @property
    def _above(self) -> Any:
        return self.screen.history.top

    @property
    def text(self) -> str:
        """The lines as one text."""
        return "\n".join(self.lines)

    def expect(self, text: str, times: int = 1) -> None:
        """Wait until a text is shown."""
        self.wait(lambda: self.text.count(text) >= times, f"{text!r} is not shown")

    def prompt(self) -> None:
        """Wait until the last line above the status is an empty prompt."""
        self.wait(
            lambda: self.screen.display[self.screen.cursor.y].rstrip() in (">>>", ">>> "),
            "there is no prompt",
        )

    def wait(self, ready: Callable[[], bool], otherwise: str) -> None:
        """Read until something is so."""
        deadline = time.monotonic() + SECONDS
        while not ready():
            if time.monotonic() > deadline or not self._read(deadline - time.monotonic()):
                raise AssertionError(f"{otherwise}:\n{self.text}")

    def settle(self, seconds: float = 0.3) -> None:
        """Read until nothing comes for a moment."""
        while self._read(seconds, quiet=True):
            pass

    def _read(self, seconds: float, *, quiet: bool = False) -> bool:
        """Read what is there; False at the end, or after a time without anything."""
        if not select.select([self._main], [], [], max(0.0, seconds))[0]:
            return False
        try:
            data = os.read(self._main, 65536)
        except OSError:
            return False
        self.raw += data.decode(errors="replace")
        self._stream.feed(data)
        return bool(data)

    def close(self) -> int:
        """Read to the end; the exit status."""
        deadline = time.monotonic() + SECONDS
        while self.process.poll() is None and time.monotonic() < deadline:
            self._read(0.05)
        self.settle(0.05)
        return self.process.wait(5)


def _take_terminal() -> None:
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
