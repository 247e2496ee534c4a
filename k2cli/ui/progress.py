"""Progress in bytes on stderr: a bar on a terminal, a plain line every 10 seconds elsewhere."""

from __future__ import annotations

import time
from collections.abc import Sequence
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
from k2cli.units import format_bytes, format_duration, one_line

_SECONDS_BETWEEN_LINES = 10.0


class ByteProgress:
    """Display of successive steps, for use in a ``with`` statement."""

    def __init__(self) -> None:
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._text = ""
        self._last_line_seconds = 0.0
        self._file_tasks: dict[str, TaskID] = {}

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

    def transfer(
        self,
        done_bytes: int,
        total_bytes: int,
        received_bytes: int,
        seconds: float,
        files: Sequence[tuple[str, int, int]],
        text: str,
    ) -> None:
        """Update the progress of a transfer of several files.

        The rate, and with it the time left, is that of this run: bytes of an earlier one cost none.

        Args:
            files: name, done and total bytes of the files that are being transferred.
            text: what it waits for; "" if it does not wait.
        """
        rate = received_bytes / seconds if seconds > 0 else 0.0
        now = time.monotonic()
        if not stderr_console().is_terminal:
            if now - self._last_line_seconds >= _SECONDS_BETWEEN_LINES:
                self._last_line_seconds = now
                note(f"{self._text}: {_described(done_bytes, total_bytes, rate, text)}")
                for name, done, total in files:
                    note(f"  {one_line(name)}: {format_bytes(done)} of {format_bytes(total)}")
            return
        self._draw_files(files)
        self._draw(done_bytes, total_bytes)
        if self._bar is not None and self._task is not None:
            described = _rate_and_rest(done_bytes, total_bytes, rate)
            self._bar.update(self._task, description=one_line(" ".join([described, text])))

    def _draw_files(self, files: Sequence[tuple[str, int, int]]) -> None:
        """Draw a line for each file, below the total."""
        self._draw_total_first()
        assert self._bar is not None
        current = {name for name, _, _ in files}
        for name in [name for name in self._file_tasks if name not in current]:
            self._bar.remove_task(self._file_tasks.pop(name))
        for name, done, total in files:
            if name not in self._file_tasks:
                self._file_tasks[name] = self._bar.add_task(one_line(name), total=total)
            self._bar.update(self._file_tasks[name], completed=done)

    def _draw_total_first(self) -> None:
        if self._bar is None:
            self._bar = Progress(
                BarColumn(),
                DownloadColumn(),
                TextColumn("{task.description}", markup=False),
                console=stderr_console(),
                transient=True,
            )
            self._bar.start()
            self._task = self._bar.add_task("", total=None)

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
            self._file_tasks = {}
            self._bar = None
            self._task = None


def _described(done_bytes: int, total_bytes: int, rate: float, text: str) -> str:
    parts = [f"{format_bytes(done_bytes)} of {format_bytes(total_bytes)}"]
    parts += [part for part in (_rate_and_rest(done_bytes, total_bytes, rate), text) if part]
    return ", ".join(parts)


def _rate_and_rest(done_bytes: int, total_bytes: int, rate: float) -> str:
    """Describe the rate and the time left; "" while nothing has arrived."""
    if rate <= 0:
        return ""
    left = format_duration(max(0, total_bytes - done_bytes) / rate)
    return f"{format_bytes(int(rate))}/s, {left} left"
