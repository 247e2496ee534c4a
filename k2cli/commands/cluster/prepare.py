"""Command ``k2 cluster prepare``: install k2 on other machines."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from k2cli.commands.options import AsJson, ClusterName, NodeNames


def prepare(
    name: ClusterName = None,
    nodes: NodeNames = None,
    wheels: Annotated[
        Path | None,
        typer.Option(
            "--wheels",
            metavar="FOLDER",
            help="Folder of wheels to install from, for machines without internet.",
        ),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Install even if it is up to date.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only list what is missing.")] = False,
    json: AsJson = False,
) -> None:
    """Install this machine's versions of k2, mlx and mlx-lm on the other machines.

    Installs into the separate environment ~/.k2/env; machines that are up to date stay unchanged.

    Example: k2 cluster prepare --nodes studio-2
    """
    from k2cli.cluster.node_lookup import chosen_nodes, remember_interpreters
    from k2cli.errors import ClusterError
    from k2cli.nodes.install import prepare as prepare_nodes
    from k2cli.ui.cluster_view import show_prepared, show_step
    from k2cli.ui.output import print_json

    found, chosen = chosen_nodes(name, nodes)
    results = []
    for result in prepare_nodes(
        chosen, wheels=wheels, force=force, dry_run=dry_run, on_step=show_step
    ):
        results.append(result)
        show_prepared(result)
    if found is not None and not dry_run:
        remember_interpreters(found, {r.node: r.python for r in results if r.python})
    order = [node.name for node in chosen]
    results.sort(key=lambda result: order.index(result.node))
    if json:
        print_json({"schema_version": 1, "nodes": results})
    failed = [result.node for result in results if result.status == "failed"]
    if failed:
        raise ClusterError(f"not ready: {', '.join(failed)}")
