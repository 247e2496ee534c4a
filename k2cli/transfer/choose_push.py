"""Choice of the nodes, the source and the files of a transfer, by names on a command line."""

from __future__ import annotations

import shlex
import tempfile
from collections.abc import Sequence
from pathlib import Path

from k2cli.agent.weights.messages import ModelFiles
from k2cli.cluster.description import Cluster, load_cluster
from k2cli.cluster.node_lookup import node_named, node_named_in
from k2cli.errors import UsageError
from k2cli.models.checkpoint import Checkpoint, read_checkpoint
from k2cli.models.reference import is_path
from k2cli.nodes.node import LOCALHOST, Node
from k2cli.planning.plan import Plan, read_plan
from k2cli.transfer.addresses import cluster_with
from k2cli.transfer.headers import fetch_headers
from k2cli.transfer.parts import files_of_nodes
from k2cli.transfer.push import find_source
from k2cli.transfer.request import PushRequest
from k2cli.transfer.ways import Over


def portable_reference(reference: str) -> str:
    """Make a relative path absolute; ``~`` stays, since each machine has its own home."""
    if reference.startswith("~"):
        return reference
    return str(Path(reference).absolute()) if is_path(reference) else reference


def choose_push(
    reference: str,
    names: Sequence[str],
    *,
    cluster_name: str | None = None,
    plan_file: Path | None = None,
    source: str | None = None,
    over: Over = "auto",
    replace: bool = False,
) -> PushRequest:
    """Choose the nodes and their files.

    Args:
        reference: the model.
        names: the nodes; empty for all of the cluster or the plan.
        cluster_name: a described cluster, whose links are used.
        plan_file: a plan; nodes then get what its ranks read. None for the whole model.
        source: the node that sends; by default this machine, or else the first node that has all.
        over: the way of the data.
        replace: replace files of the same name with another content.

    Raises:
        UsageError: if names, cluster and plan do not fit together.
        ClusterError: if no node has the model.
    """
    reference = portable_reference(reference)
    cluster = load_cluster(cluster_name) if cluster_name is not None else None
    plan = read_plan(plan_file) if plan_file is not None else None
    ranks = rank_names(cluster, plan)
    if not names and not ranks:
        raise UsageError("no node is named", f"k2 models push {shlex.quote(reference)} NODE")
    chosen = _chosen(names, ranks, cluster)
    senders = [_node(source, cluster)] if source is not None else [_node(LOCALHOST, None), *chosen]
    sender, found = find_source(reference, list({node.name: node for node in senders}.values()))
    nodes = tuple(node for node in chosen if node.name != sender.name)
    if cluster is None:
        cluster = cluster_with([sender.name, *(node.name for node in nodes)])
    wanted = {}
    if plan is not None:
        checkpoint = read_headers(reference, sender, found)
        wanted = files_of_nodes(checkpoint, plan.placement, ranks)
    given = {"--cluster": cluster_name, "--plan": plan_file, "--from": source}
    pairs = [(option, str(value)) for option, value in given.items() if value is not None]
    options = [word for pair in pairs for word in pair]
    options += ["--replace"] if replace else []
    return PushRequest(
        reference, sender, found, nodes, wanted, cluster, over, replace, tuple(options)
    )


def rank_names(cluster: Cluster | None, plan: Plan | None) -> list[str]:
    """Return the node of each rank: those of the cluster, or else those that the plan names.

    Raises:
        UsageError: if the plan is for another number of ranks, or for machines of the catalog.
    """
    if plan is None:
        return [node.name for node in cluster.rank_nodes] if cluster is not None else []
    planned = [part.node for part in plan.placement.ranks]
    if cluster is not None:
        names = [node.name for node in cluster.rank_nodes]
        if len(names) != len(planned):
            raise UsageError(
                f"the plan is for {len(planned)} rank(s), and cluster {cluster.name} has "
                f"{len(names)}"
            )
        return names
    if any("/" in name for name in planned):
        raise UsageError(
            f"the plan is for {', '.join(planned)}, which are machines of the catalog",
            "--cluster NAME",
        )
    return planned


def _chosen(names: Sequence[str], ranks: Sequence[str], cluster: Cluster | None) -> list[Node]:
    wanted = list(dict.fromkeys(names or ranks))
    nodes = [_node(name, cluster) for name in wanted]
    for node in nodes:
        if ranks and node.name not in ranks:
            raise UsageError(f"'{node.name}' is none of {', '.join(dict.fromkeys(ranks))}")
    return nodes


def _node(name: str, cluster: Cluster | None) -> Node:
    if cluster is not None and cluster.node(name) is not None:
        return node_named_in(cluster, name)
    return node_named(name)


def read_headers(reference: str, sender: Node, found: ModelFiles) -> Checkpoint:
    """Read config and headers of the model on the node that sends it."""
    if sender.is_local:
        return read_checkpoint(Path(found.folder))
    with tempfile.TemporaryDirectory(prefix="k2-heads-") as base:
        return read_checkpoint(fetch_headers(reference, sender, Path(base)))
