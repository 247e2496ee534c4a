"""Command ``k2 ps``: list live and ended runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from k2cli.runs.record import RunRecord

_ASKED_AT_ONCE = 8


def ps(
    json: Annotated[bool, typer.Option("--json", help="Print the runs as JSON.")] = False,
) -> None:
    """List live and recently ended runs, with their GPUs and the cause of each failure.

    A live run that answers is shown with its requests and its tokens per second.

    A run whose launcher was killed is shown as lost, or as orphaned if some of its processes are
    still alive.

    Example: k2 ps --json
    """
    from k2cli.runs.record import SCHEMA_VERSION, list_runs
    from k2cli.ui.output import print_json, warn
    from k2cli.ui.run_table import print_runs

    runs = list_runs(lambda _, text: warn(text))
    statuses = _statuses([run for run in runs if run.live and run.url])
    if json:
        print_json({"schema_version": SCHEMA_VERSION, "runs": runs, "status": statuses})
    else:
        from k2cli.client.status_document import status_document

        print_runs(runs, {run_id: status_document(each) for run_id, each in statuses.items()})


def _statuses(runs: Sequence[RunRecord]) -> dict[str, dict[str, Any]]:
    """Ask all live runs at once; those that do not answer in time are left out."""
    if not runs:
        return {}
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(_ASKED_AT_ONCE) as pool:
        found = zip(runs, pool.map(_status, runs), strict=True)
        return {run.run_id: status for run, status in found if status is not None}


def _status(run: RunRecord) -> dict[str, Any] | None:
    from k2cli.client.status import read_status
    from k2cli.commands.target import key_of
    from k2cli.errors import K2Error

    try:
        return read_status(run.url, key_of(run), run.certificate_file)
    except K2Error:  # the key or the certificate cannot be read
        return None
