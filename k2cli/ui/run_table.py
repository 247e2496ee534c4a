"""Table of runs, as ``k2 ps`` prints it."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from k2cli.ui.gpus import gpu_text
from k2cli.ui.output import note, print_line, print_text
from k2cli.units import format_bytes, format_duration, one_line

if TYPE_CHECKING:
    from k2cli.client.status_document import StatusDocument
    from k2cli.runs.record import RunRecord

_HEADINGS = ("RUN", "MODEL", "STATE", "RANKS", "WEIGHTS", "AGE", "URL")
_GAP = "  "
_LEAST_IMPORTANT = ("WEIGHTS", "MODEL", "AGE")
"""Columns that a narrow terminal does not show, in this order; a run's name has its model's."""


def print_runs(runs: Sequence[RunRecord], statuses: Mapping[str, StatusDocument]) -> None:
    """Print one line per run; below it GPUs and requests of a live run, or a failure's cause.

    Args:
        runs: the runs, newest first.
        statuses: of the live runs that have answered, by their ids.
    """
    if not runs:
        note("no runs; start one with: k2 launch MODEL --detach")
        return
    rows = [_row(run) for run in runs]
    widths = _widths([_HEADINGS, *rows])
    print_text(_line(_HEADINGS, widths))
    for run, row in zip(runs, rows, strict=True):
        print_line(_line(row, widths))
        if run.live and (gpus := gpu_text((rank.node, rank) for rank in run.ranks)):
            print_line(f"  {gpus}")
        if run.live and run.ends_with_chats:
            print_line("  started by k2 chat; it ends with its last chat")
        if run.live and run.ends_with_check:
            print_line("  started by k2 doctor --deep; it ends with the check")
        if (status := statuses.get(run.run_id)) is not None:
            print_line(f"  {_activity(status)}")
        if run.cause and (run.left or run.state not in ("ready", "stopped")):
            print_line(f"  {run.cause}")


def _widths(rows: Sequence[Sequence[str]]) -> dict[int, int]:
    """Return the widths of the columns to show: all of them, but on a narrow terminal."""
    widths = {column: max(len(row[column]) for row in rows) for column in range(len(_HEADINGS))}
    if sys.stdout.isatty():
        most = shutil.get_terminal_size().columns
        for name in _LEAST_IMPORTANT:
            if sum(widths.values()) + len(_GAP) * (len(widths) - 1) > most:
                del widths[_HEADINGS.index(name)]
    return widths


def _row(run: RunRecord) -> tuple[str, ...]:
    weights = sum(rank.weights_bytes for rank in run.ranks)
    placement = f"{len(run.ranks)} {run.strategy}" if len(run.ranks) > 1 else "1"
    return (
        run.run_id,
        one_line(run.model_name),
        run.state,
        placement,
        format_bytes(weights) if weights and run.live else "-",
        format_duration(max(time.time() - run.created, 1)),
        run.url if run.live and run.url else "-",
    )


def _activity(status: StatusDocument) -> str:
    waiting = status.requests.queued + status.requests.reading
    running = status.requests.prefill + status.requests.decode
    rates = status.throughput
    if not running and not waiting:
        return "no requests"
    run = "request runs" if running == 1 else "requests run"
    wait = "waits" if waiting == 1 else "wait"
    return (
        f"{running} {run}, {waiting} {wait}; "
        f"{rates.completion_tokens_per_second:.1f} tokens/s, "
        f"{rates.prompt_tokens_per_second:.0f} tokens/s of prompts"
    )


def _line(fields: Sequence[str], widths: Mapping[int, int]) -> str:
    return _GAP.join(fields[column].ljust(width) for column, width in widths.items()).rstrip()
