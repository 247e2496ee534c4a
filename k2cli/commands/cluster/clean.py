"""Command ``k2 cluster clean``: end processes that dead runs left on the machines of a cluster."""

from __future__ import annotations

from k2cli.commands.options import AsJson, ClusterName, NodeNames


def clean(name: ClusterName = None, nodes: NodeNames = None, json: AsJson = False) -> None:
    """End processes that dead runs left on the machines, and release their locks.

    Live runs are not touched. A run's leftovers are recognised by its lock, its folder, and its
    id after --k2-run on a command line.

    Example: k2 cluster clean studios
    """
    from k2cli.cluster.node_lookup import chosen_nodes
    from k2cli.errors import ClusterError
    from k2cli.runs.clean import clean as clean_nodes
    from k2cli.ui.cluster_view import print_cleaning
    from k2cli.ui.output import print_json

    _, chosen = chosen_nodes(name, nodes)
    reports = clean_nodes(chosen)
    if json:
        print_json({"schema_version": 1, "nodes": reports})
    else:
        print_cleaning(reports)
    left = [
        report.node
        for report in reports
        if report.problem or any(run.remaining for run in report.cleared)
    ]
    if left:
        raise ClusterError(f"not clean: {', '.join(left)}")
