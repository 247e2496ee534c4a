"""Command ``k2 logs``: print the merged log of a run's ranks, guards and launcher."""

from __future__ import annotations

from typing import Annotated

import typer


def logs(
    run: Annotated[
        str | None,
        typer.Argument(
            metavar="RUN",
            help="Id of a run, or the beginning of it: of several the live one, else the newest.",
        ),
    ] = None,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Continue until the run ends.")
    ] = False,
    lines: Annotated[
        int | None,
        typer.Option("--lines", "-n", min=0, help="Number of lines to show, from the end."),
    ] = None,
    json: Annotated[
        bool, typer.Option("--json", help="Print each line as a JSON document.")
    ] = False,
) -> None:
    """Show the log of a run, each line with its node and rank.

    Without RUN, shows the most recent run, live or ended.

    Example: k2 logs -f -n 20
    """
    from k2cli.runs.log import follow as follow_log
    from k2cli.runs.log import last_lines, parse_entry
    from k2cli.runs.record import find_run
    from k2cli.ui.output import print_json_line, print_line

    record = find_run(run, live=False)
    path = record.log_file
    shown = (
        follow_log(path, lines, lambda: not find_run(record.run_id).live)
        if follow
        else last_lines(path, lines)
    )
    for line in shown:
        if json:
            print_json_line(parse_entry(line))
        else:
            print_line(line)
