"""Display of ``k2 launch`` on stderr: the loading progress of each rank, then the merged log.

A terminal shows one bar per rank; otherwise a line is printed when a rank enters a new phase.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING

from k2cli.ui.output import note, stderr_console, stderr_is_plain, warn
from k2cli.units import format_bytes, format_duration, format_rate, one_line

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID


class LaunchView:
    """Display of one launch; a context manager that restores the terminal.

    Args:
        nodes: the node of each rank, in rank order.
        log: True to show log lines.
    """

    def __init__(self, nodes: Sequence[str], *, log: bool) -> None:
        self._nodes = nodes
        self._log = log
        self._phases: dict[int, str] = {}
        self._tasks: dict[int, TaskID] = {}
        self._told_failure = False
        self._bars = None if stderr_is_plain() else _bars()

    def __enter__(self) -> LaunchView:
        if self._bars is not None:
            self._bars.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.end_progress()

    def end_progress(self) -> None:
        """Remove the bars."""
        if self._bars is not None:
            self._bars.stop()
            self._bars = None

    def warming_up(self, rank: int, shape: str, number: int, count: int) -> None:
        """Show the shape of steps that a rank warms up; a count of 0 is not known yet."""
        of = f" {number} of {count} shapes" if count else ""
        text = f"warming up{of}: {one_line(shape)}"
        if self._bars is not None:
            self._update(rank, text, number - 1, count)
        elif self._phases.get(rank) != (part := text.partition(", chunk ")[0]):
            note(f"{self._who(rank)}: {part}")
            self._phases[rank] = part
            return
        else:
            return
        self._phases[rank] = "warming up"

    def progress(self, rank: int, phase: str, done_bytes: int, total_bytes: int) -> None:
        """Show the phase of a rank; the bytes are of its own weights, 0 of 0 if not counted."""
        if self._bars is not None:
            self._draw(rank, phase, done_bytes, total_bytes)
        elif self._phases.get(rank) != phase:
            size = f" {format_bytes(total_bytes)}" if total_bytes else ""
            note(one_line(f"{self._who(rank)}: {phase}{size}"))
        self._phases[rank] = phase

    def _draw(self, rank: int, phase: str, done_bytes: int, total_bytes: int) -> None:
        figures = one_line(phase)
        if total_bytes > 0:
            figures += f" {format_bytes(done_bytes)} of {format_bytes(total_bytes)}"
        self._update(rank, figures, done_bytes, total_bytes)

    def _update(self, rank: int, figures: str, done: int, total: int) -> None:
        """Change the bar of a rank; a total of 0 is not known."""
        assert self._bars is not None
        if rank not in self._tasks:
            self._tasks[rank] = self._bars.add_task(self._who(rank), total=None, figures="")
        self._bars.update(self._tasks[rank], completed=done, total=total or None, figures=figures)

    def rank_ready(
        self, rank: int, weights_bytes: int, load_seconds: float, bytes_read: int = 0
    ) -> None:
        """Report that a rank has loaded its weights, and how fast it read them."""
        duration, rate = format_duration(load_seconds), format_rate(bytes_read, load_seconds)
        loaded = f"loaded {format_bytes(weights_bytes)} in {duration}"
        note(f"{self._who(rank)}: {loaded}" + (f", {rate}" if rate else ""))
        if self._bars is not None and rank in self._tasks:
            self._bars.update(self._tasks[rank], completed=1, total=1, figures="loaded")

    def ready(
        self, run_id: str, model_name: str, url: str, checked_tokens: int = 0, remark: str = ""
    ) -> None:
        """Report that the API answers, and with how many tokens the link was checked.

        Args:
            remark: what is not as it was asked for.
        """
        self.end_progress()
        if remark:
            warn(one_line(remark))
        if checked_tokens:
            note(f"link check: {checked_tokens:,} tokens came out equal twice on all ranks")
        note(f"\nready: {one_line(model_name)} at {one_line(url)}/v1 (run {run_id})")

    def failed(self, rank: int, cause: str) -> None:
        """Report a failed rank at once, because an unreachable node delays the end of the run."""
        if not self._told_failure:
            self._told_failure = True
            self.end_progress()
            note(f"{self._who(rank)} failed: {one_line(cause)}; ending the run on every node")

    def restarting(self, cause: str, attempt: int, delay_seconds: float) -> None:
        """Report that the run has failed and will start again."""
        self._told_failure = False
        self._phases.clear()
        self.end_progress()
        wait = format_duration(max(delay_seconds, 1))
        note(f"{one_line(cause)}; attempt {attempt} begins in {wait}")

    def line(self, node: str, rank: int, text: str) -> None:
        """Show a line of the log."""
        if self._log:
            note(one_line(f"{node} {rank} | {text}"))

    def _who(self, rank: int) -> str:
        return one_line(f"rank {rank} on {self._nodes[rank]}")


def _bars() -> Progress | None:
    """Return a display for bars, or None if the terminal cannot draw them."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    console = stderr_console()
    if not console.is_terminal or os.environ.get("TERM") == "dumb":
        return None
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[figures]}", markup=False),
        console=console,
        transient=True,
    )


def print_last_lines(lines: Sequence[str]) -> None:
    """Print the last lines that a rank wrote before it failed."""
    if lines:
        note("\nits last lines:")
        for line in lines:
            note(f"  {one_line(line)}")
