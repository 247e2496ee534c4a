"""Nodes by name: names that a user types, and nodes of a described cluster."""

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
    """Make the node for a name that the user gave.

    Raises:
        UsageError: if it cannot be the name of a node.
    """
    if is_this_machine(name):
        return LocalNode()
    return SshNode(name, recorded_python=recorded_interpreter(name))


def node_named_in(cluster: Cluster, name: str) -> Node:
    """Make a node of a cluster, with the interpreter and address from the description.

    Raises:
        UsageError: if the cluster has no node of that name.
    """
    node = cluster.node(name)
    if node is None:
        names = ", ".join(node.name for node in cluster.nodes)
        raise UsageError(f"cluster {cluster.name} has no node '{name}'", f"it has {names}")
    if is_this_machine(node.name):
        return LocalNode()
    return SshNode(node.name, node.python, common_addresses(cluster).get(node.name))


def cluster_nodes(cluster: Cluster) -> list[Node]:
    """Make all nodes of a cluster, in its order."""
    return [node_named_in(cluster, node.name) for node in cluster.nodes]


def chosen_nodes(name: str | None, nodes: str | None) -> tuple[Cluster | None, list[Node]]:
    """Make the nodes that a command line names, or else those of a cluster.

    Args:
        name: the name of a cluster; None for the only one.
        nodes: names for ssh, separated by commas.

    Raises:
        UsageError: if both are given, or the cluster does not exist.
    """
    if nodes is None:
        cluster = load_cluster(name)
        return cluster, cluster_nodes(cluster)
    if name is not None:
        raise UsageError(
            f"a cluster, {name}, and --nodes {nodes} are both given: give only one of them",
            "leave out --nodes"
            if name in list_clusters()
            else f"there is no cluster '{name}'; nodes are one list: {nodes},{name}",
        )
    names = [part.strip() for part in nodes.split(",")]
    if not all(names):
        raise UsageError(f"--nodes '{nodes}' has an empty name", "--nodes a,b")
    named = [node_named(name) for name in names]
    return None, list({node.name: node for node in named}.values())


def recorded_interpreter(name: str) -> str | None:
    """Look up the interpreter of k2 on a machine in the descriptions of clusters."""
    for cluster in list_clusters():
        with contextlib.suppress(ClusterError):  # commands that name the cluster report the damage
            node = load_cluster(cluster).node(name)
            if node is not None and node.python is not None:
                return node.python
    return None


def remember_interpreters(cluster: Cluster, pythons: Mapping[str, str]) -> Cluster:
    """Save the interpreters of k2 by node in the cluster's description."""
    known = [
        msgspec.structs.replace(node, python=pythons.get(node.name, node.python))
        for node in cluster.nodes
    ]
    changed = msgspec.structs.replace(cluster, nodes=tuple(known))
    if changed != cluster:
        save_cluster(changed)
    return changed
