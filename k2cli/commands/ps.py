"""``k2 ps``: what runs, and what became of what ran."""

from __future__ import annotations

from typing import Annotated

import typer


def ps(
    json: Annotated[bool, typer.Option("--json", help="Print the runs as JSON.")] = False,
) -> None:
    """List runs: those that live, and the last ones that ended, with the cause.

    A run whose launcher was killed is shown as lost, or as orphaned if processes of it remain.

    Example: k2 ps --json
    """
    from k2cli.runs.record import SCHEMA_VERSION, list_runs
    from k2cli.ui.output import print_json
    from k2cli.ui.run_table import print_runs

    runs = list_runs()
    if json:
        print_json({"schema_version": SCHEMA_VERSION, "runs": runs})
    else:
        print_runs(runs)
