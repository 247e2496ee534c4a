"""``k2 launch --fetch``: bring the weights that a launch lacks to its nodes."""

from __future__ import annotations

from collections.abc import Sequence

from k2cli.cluster.description import Cluster
from k2cli.launch.model_copies import Copies
from k2cli.launch.model_source import ModelSource
from k2cli.nodes.local import LocalNode
from k2cli.nodes.node import Node
from k2cli.transfer.addresses import cluster_with
from k2cli.transfer.push import find_source, push
from k2cli.transfer.request import OnPushEvent, PushRequest


def fetch_lacking(
    nodes: Sequence[Node],
    reference: str,
    source: ModelSource,
    copies: Copies,
    cluster: Cluster | None,
    on_event: OnPushEvent,
) -> None:
    """Bring each node the files that its ranks read.

    The model comes from this machine if it has all of it, or else from the first node that does.

    Raises:
        ClusterError: if no machine has the whole model, or a node cannot receive it.
    """
    by_name: dict[str, Node] = {node.name: node for node in nodes}
    senders: list[Node] = [LocalNode()] if source.source_node is None else []
    senders += [node for node in by_name.values() if not (senders and node.is_local)]
    sender, found = find_source(reference, senders)
    receivers = tuple(by_name[each.node] for each in copies.lacking)
    if cluster is None:
        cluster = cluster_with([sender.name, *(node.name for node in receivers)])
    push(PushRequest(reference, sender, found, receivers, copies.wanted or {}, cluster), on_event)
