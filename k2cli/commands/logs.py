"""``k2 logs``: the merged log of a run's ranks, guards and launcher."""

from __future__ import annotations

from typing import Annotated

import typer


def logs(
    run: Annotated[
        str | None, typer.Argument(metavar="RUN", help="A run's id or the beginning of it.")
    ] = None,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Go on until the run ends.")
    ] = False,
    lines: Annotated[
        int | None, typer.Option("--lines", "-n", min=0, help="Only the last lines.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="One JSON document per line.")] = False,
) -> None:
    """Show what the ranks of a run wrote, each line with its node and rank.

    Without RUN, of the most recent run, whether it lives or not.

    Example: k2 logs -f -n 20
    """
    from k2cli.runs.log import follow as follow_log
    from k2cli.runs.log import last_lines, parse_entry
    from k2cli.runs.record import find_run
    from k2cli.ui.output import print_json_line, print_text

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
            print_text(line)
