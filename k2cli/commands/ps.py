"""Command ``k2 ps``: list live and ended runs."""

from __future__ import annotations

from typing import Annotated

import typer


def ps(
    json: Annotated[bool, typer.Option("--json", help="Print the runs as JSON.")] = False,
) -> None:
    """List live and recently ended runs, with their GPUs and the cause of each failure.

    A run whose launcher was killed is shown as lost, or as orphaned if some of its processes are
    still alive.

    Example: k2 ps --json
    """
    from k2cli.runs.record import SCHEMA_VERSION, list_runs
    from k2cli.ui.output import print_json, warn
    from k2cli.ui.run_table import print_runs

    runs = list_runs(lambda _, text: warn(text))
    if json:
        print_json({"schema_version": SCHEMA_VERSION, "runs": runs})
    else:
        print_runs(runs)
