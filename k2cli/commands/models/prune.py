"""Command ``k2 models prune``: free what nothing needs."""

from __future__ import annotations

import math
from typing import Annotated

import typer

from k2cli.commands.models.nodes import OfCluster, Yes, confirm, models_on, raise_problems
from k2cli.commands.options import AsJson, NodeNames


def prune(
    yes: Yes = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what would be removed, and remove nothing.")
    ] = False,
    older_than: Annotated[
        float,
        typer.Option(
            min=0, max=87600, metavar="HOURS", help="Least age of what interrupted transfers left."
        ),
    ] = 24.0,
    cluster: OfCluster = None,
    nodes: NodeNames = None,
    json: AsJson = False,
) -> None:
    """Remove what nothing needs: old revisions, remains of interrupted transfers, lost contents.

    An old revision is one to which no branch or tag points; one that was downloaded by its commit
    is kept. What a run uses, or a transfer is writing, is kept too.

    Example: k2 models prune --dry-run
    """
    from k2cli.errors import K2Error, UsageError
    from k2cli.ui.models_view import print_prunable
    from k2cli.ui.output import note, print_json, print_line
    from k2cli.ui.slow import told_if_slow
    from k2cli.units import format_bytes

    if math.isnan(older_than):
        raise UsageError("--older-than 'nan' is not a number", "--older-than 24")
    asked = models_on(cluster, nodes)
    with told_if_slow("reading the models"):
        answers = asked.prunable(older_than)
    raise_problems(answers)
    found = [(each.node, each.answer.found) for each in answers if each.answer is not None]
    total = sum(item.bytes for _, result in found for item in result.items)
    if not json:
        print_prunable(found, show_nodes=not asked.is_here)
    problem = hint = ""
    items = {node: result.items for node, result in found}
    if any(items.values()) and not dry_run:
        options = f" --cluster {cluster}" if cluster else f" --nodes {nodes}" if nodes else ""
        command = "k2 models prune" + options
        confirm(f"remove this, {format_bytes(total)}?", yes, command)
        try:
            done = asked.prune(
                older_than, {name: [item.path for item in each] for name, each in items.items()}
            )
        except KeyboardInterrupt:
            note(f"\nto remove the rest: {command} --yes")
            raise
        raise_problems(done)
        items = {each.node: each.answer.found.items for each in done if each.answer is not None}
        for each in done:
            if each.answer is not None and each.answer.problem and not problem:
                problem, hint = each.answer.problem, each.answer.hint
    if json:
        document = [
            {"node": node, "items": items[node], "kept": result.kept} for node, result in found
        ]
        print_json({"schema_version": 1, "dry_run": dry_run, "nodes": document})
    elif any(items.values()) and not dry_run and not problem:
        print_line(f"freed {format_bytes(total)}")
    if problem:
        raise K2Error(problem, hint or None)
