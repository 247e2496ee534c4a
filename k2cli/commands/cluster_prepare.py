"""``k2 cluster prepare``: what k2 puts on other machines."""

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
            help="Install from this folder, where there is no internet.",
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Install anew in any case.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what is missing.")] = False,
    json: AsJson = False,
) -> None:
    """Install this very k2, with the mlx and mlx-lm of this machine, on the other machines.

    It goes into an environment of its own, ~/.k2/env; what is there already is left as it is.

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
