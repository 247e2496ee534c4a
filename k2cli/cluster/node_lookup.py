"""From names to nodes: those that a user types, and those of a described cluster."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping

import msgspec

from k2cli.cluster.description import Cluster, list_clusters, load_cluster, save_cluster
from k2cli.cluster.links import common_addresses
from k2cli.errors import ClusterError, UsageError
from k2cli.nodes.local import LocalNode
from k2cli.nodes.node import Node, is_this_machine
from k2cli.nodes.ssh import SshNode


def node_named(name: str) -> Node:
    """The node that a user's name stands for.

    Raises:
        UsageError: if it cannot be a name.
    """
    if is_this_machine(name):
        return LocalNode()
    return SshNode(name, recorded_python=recorded_interpreter(name))


def node_named_in(cluster: Cluster, name: str) -> Node:
    """The node of a cluster, with the interpreter that the description has for it.

    Raises:
        UsageError: if the cluster has none of that name.
    """
    node = cluster.node(name)
    if node is None:
        names = ", ".join(node.name for node in cluster.nodes)
        raise UsageError(f"cluster {cluster.name} has no node '{name}'", f"it has {names}")
    if is_this_machine(node.name):
        return LocalNode()
    return SshNode(node.name, node.python, common_addresses(cluster).get(node.name))


def cluster_nodes(cluster: Cluster) -> list[Node]:
    """All nodes of a cluster, in its order."""
    return [node_named_in(cluster, node.name) for node in cluster.nodes]


def chosen_nodes(name: str | None, nodes: str | None) -> tuple[Cluster | None, list[Node]]:
    """What a command line means: the machines given, else those of a cluster.

    Args:
        name: of a cluster; None for the only one.
        nodes: names for ssh, separated by commas.

    Raises:
        UsageError: if both are given, or what is given does not exist.
    """
    if nodes is None:
        cluster = load_cluster(name)
        return cluster, cluster_nodes(cluster)
    if name is not None:
        raise UsageError(
            f"a cluster, {name}, and --nodes {nodes} are both given, so say which is meant"
        )
    names = [part.strip() for part in nodes.split(",")]
    if not all(names):
        raise UsageError(f"--nodes '{nodes}' has an empty name", "--nodes a,b")
    named = [node_named(name) for name in names]
    return None, list({node.name: node for node in named}.values())


def recorded_interpreter(name: str) -> str | None:
    """Which interpreter ran k2 on a machine when it was described last, if it was."""
    for cluster in list_clusters():
        with contextlib.suppress(ClusterError):  # a damaged file is told where it is asked for
            node = load_cluster(cluster).node(name)
            if node is not None and node.python is not None:
                return node.python
    return None


def remember_interpreters(cluster: Cluster, pythons: Mapping[str, str]) -> Cluster:
    """Save which interpreter runs k2 on each node."""
    known = [
        msgspec.structs.replace(node, python=pythons.get(node.name, node.python))
        for node in cluster.nodes
    ]
    changed = msgspec.structs.replace(cluster, nodes=tuple(known))
    if changed != cluster:
        save_cluster(changed)
    return changed
