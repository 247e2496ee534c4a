"""Progress in bytes on stderr: a bar on a terminal, a plain line every 10 seconds elsewhere."""

from __future__ import annotations

import time
from types import TracebackType

from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from k2cli.ui.output import note, stderr_console
from k2cli.units import format_bytes

_SECONDS_BETWEEN_LINES = 10.0


class ByteProgress:
    """Display of successive steps, for use in a ``with`` statement."""

    def __init__(self) -> None:
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._text = ""
        self._last_line_seconds = 0.0

    def __enter__(self) -> ByteProgress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._end_bar()

    def step(self, text: str) -> None:
        """Begin a new step, and print its text as a permanent line."""
        self._end_bar()
        self._text = text
        self._last_line_seconds = time.monotonic()
        note(text)

    def advance(self, done_bytes: int, total_bytes: int) -> None:
        """Update the progress of the step; ``total_bytes`` is 0 if unknown."""
        if stderr_console().is_terminal:
            self._draw(done_bytes, total_bytes)
            return
        now = time.monotonic()
        if now - self._last_line_seconds >= _SECONDS_BETWEEN_LINES:
            self._last_line_seconds = now
            of = f" of {format_bytes(total_bytes)}" if total_bytes else ""
            note(f"{self._text}: {format_bytes(done_bytes)}{of}")

    def _draw(self, done_bytes: int, total_bytes: int) -> None:
        if self._bar is None:
            self._bar = Progress(
                BarColumn(),
                DownloadColumn(),
                TransferSpeedColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.description}", markup=False),
                console=stderr_console(),
                transient=True,
            )
            self._bar.start()
            self._task = self._bar.add_task("", total=None)
        assert self._task is not None  # set with the bar
        self._bar.update(self._task, completed=done_bytes, total=total_bytes or None)

    def _end_bar(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
            self._task = None
