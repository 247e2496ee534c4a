"""The addresses at which one node reaches another to send weights, the fastest link first."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

from k2cli.agent.ports import address_towards
from k2cli.cluster.description import Cluster, list_clusters, load_cluster
from k2cli.cluster.links import links_between
from k2cli.errors import ClusterError, UsageError
from k2cli.nodes.node import Node


def cluster_with(names: Sequence[str]) -> Cluster | None:
    """Return the first described cluster that has all of these nodes; None if there is none."""
    for name in list_clusters():
        with contextlib.suppress(ClusterError, UsageError):
            cluster = load_cluster(name)
            if all(cluster.node(node) is not None for node in names):
                return cluster
    return None


def receiving_addresses(cluster: Cluster | None, sender: Node, receiver: Node) -> tuple[str, ...]:
    """List addresses of the receiver that the sender may reach, in the order to try them.

    Those of a described cluster come first: Thunderbolt before Ethernet before Wi-Fi.
    """
    found: list[str] = []
    if cluster is not None:
        links = links_between(cluster, sender.name, receiver.name, "ring")
        found += [link.second_address for link in links if link.second_address]
    with contextlib.suppress(ClusterError, OSError):
        found.append(address_towards(sender.address()) if receiver.is_local else receiver.address())
    # An address that holds on one interface only needs its name, which the other machine lacks.
    usable = [at for at in found if not at.lower().startswith("fe80") and "%" not in at]
    return tuple(dict.fromkeys(usable))
