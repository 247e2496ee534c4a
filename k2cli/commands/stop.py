"""Command ``k2 stop``: end runs, and check that no process of them is left."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from k2cli.runs.record import RunRecord
    from k2cli.runs.stop import StopReport


def stop(
    run: Annotated[
        str | None,
        typer.Argument(
            metavar="RUN", help="Id of a run, or the beginning of it: the live one of several."
        ),
    ] = None,
    all_runs: Annotated[bool, typer.Option("--all", help="Stop all live runs.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the stopped runs as JSON.")] = False,
) -> None:
    """Stop a run, and verify on every node that none of its processes is left.

    Without RUN, stops the only live run. Clients get an error for answers that are unfinished.

    Example: k2 stop --all
    """
    from k2cli.errors import ClusterError
    from k2cli.runs.record import SCHEMA_VERSION
    from k2cli.runs.stop import stop_run
    from k2cli.ui.output import note, print_error, print_json

    reports, failed = [], []
    chosen = _chosen(run, all_runs=all_runs)
    for record in chosen:
        note(f"stopping {record.run_id} ({record.state})")
        try:
            reports.append(stop_run(record))
        except ClusterError as error:
            if len(chosen) == 1:
                raise
            print_error(error)  # the other runs are still to be stopped
            failed.append(record.run_id)
            continue
        if not json:
            _print_report(reports[-1])
    if json:
        print_json({"schema_version": SCHEMA_VERSION, "stopped": reports})
    elif not chosen:
        note("nothing to stop")
    if failed:
        raise ClusterError(f"not stopped: {', '.join(failed)}", "k2 ps")


def _chosen(run: str | None, *, all_runs: bool) -> list[RunRecord]:
    from k2cli.errors import UsageError
    from k2cli.runs.record import find_run, list_runs
    from k2cli.ui.output import warn

    if run is not None and all_runs:
        raise UsageError(f"'{run}' and --all contradict each other", f"k2 stop {run}")
    if run is not None:
        return [find_run(run)]
    live = [
        record
        for record in list_runs(lambda _, text: warn(text))
        if record.live or record.state == "orphaned"
    ]
    if all_runs:
        return live
    if len(live) > 1:
        names = ", ".join(record.run_id for record in live)
        raise UsageError(f"several runs are live: {names}", f"k2 stop {live[0].run_id}, or --all")
    return live or [find_run()]


def _print_report(report: StopReport) -> None:
    from k2cli.ui.output import print_line

    killed = f", {report.killed} process(es) had to be killed" if report.killed else ""
    if report.was_live or report.killed:
        print_line(f"{report.run_id}: stopped, nothing is left of it{killed}")
    else:
        print_line(f"{report.run_id}: had already ended ({report.state}), nothing is left of it")
