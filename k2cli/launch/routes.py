"""The addresses by which the ranks of a launch reach each other, for each transport."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import msgspec

from k2cli.agent.networks import Network
from k2cli.choices import Transport
from k2cli.errors import ClusterError, UsageError
from k2cli.nodes.node import Node, addresses

if TYPE_CHECKING:
    from k2cli.cluster.description import Cluster


@dataclass(frozen=True, slots=True)
class Routes:
    """One entry per rank where it is a list. ``words`` say which interfaces are used.

    ``reached`` is where the guards and the leader rank are reached, ``ring`` where each rank
    listens for the one before it, ``rdma`` each rank's device towards each other rank.
    """

    reached: list[str]
    ring: list[str]
    rdma: list[list[str | list[str] | None]] | None = None
    networks: list[str] = field(default_factory=list)
    words: list[str] = field(default_factory=list)


def find_routes(nodes: Sequence[Node], transport: Transport, cluster: Cluster | None) -> Routes:
    """Choose addresses, and devices for JACCL: by the cluster's description, else by ssh's names.

    Raises:
        UsageError: if JACCL is wanted, and there is no description that says which devices.
        ClusterError: if no link joins two nodes that need one, or a node cannot be asked.
    """
    described = _described(nodes, cluster)
    if transport == "jaccl" and described is None:
        raise UsageError(
            "--backend jaccl needs a described cluster: which RDMA device leads where",
            f"k2 cluster init {' '.join(node.name for node in nodes)} --name NAME, then --cluster",
        )
    reached, ring = _addresses(nodes, transport, described)
    if all(node.is_local for node in nodes):
        return Routes(reached, ring)

    networks, words = link_networks(nodes, reached)
    rdma = None
    if transport == "jaccl" and described is not None:
        from k2cli.cluster.links import to_hostfile

        hosts = to_hostfile(described, "jaccl").hosts
        rdma = [[_listed(device) for device in host.rdma] for host in hosts]
    return Routes(reached, ring, rdma, networks, words)


def _described(nodes: Sequence[Node], cluster: Cluster | None) -> Cluster | None:
    """The cluster with just these nodes, in rank order; None if one is not in it, or repeats."""
    names = [node.name for node in nodes]
    if cluster is None or len(set(names)) < len(names):
        return None
    found = [described for name in names if (described := cluster.node(name)) is not None]
    if len(found) < len(names):
        return None
    same = [node.name for node in cluster.nodes] == [node.name for node in found]
    return msgspec.structs.replace(
        cluster, nodes=tuple(found), hostfile=cluster.hostfile if same else None
    )


def _addresses(
    nodes: Sequence[Node], transport: Transport, cluster: Cluster | None
) -> tuple[list[str], list[str]]:
    if cluster is None:
        reached = addresses(nodes)
        return reached, reached
    from k2cli.cluster.links import common_addresses, to_hostfile

    common = common_addresses(cluster)
    if len(common) == len(nodes):
        reached = [common[node.name] for node in nodes]
    else:
        reached = addresses(nodes)
    if transport != "ring" or len(nodes) < 2:
        return reached, reached
    try:
        hosts = to_hostfile(cluster, "ring").hosts
    except ClusterError:
        return reached, reached  # a description without addresses: ssh's names will do
    ring = [host.ips[0] if host.ips else at for host, at in zip(hosts, reached, strict=True)]
    return reached, ring


def _listed(device: str | tuple[str, ...] | None) -> str | list[str] | None:
    return list(device) if isinstance(device, tuple) else device


def link_networks(nodes: Sequence[Node], reached: Sequence[str]) -> tuple[list[str], list[str]]:
    """The networks by which nodes reach each other, and the same in words.

    Args:
        nodes: one per rank.
        reached: the address of each.

    Returns:
        Networks in CIDR notation, each once, and ``node: interface address`` for each node. Both
        are empty if an address is not one that its machine knows itself by (behind NAT).

    Raises:
        ClusterError: if a node cannot be asked.
    """
    networks: list[str] = []
    words: list[str] = []
    for name, (node, address) in {
        node.name: (node, address) for node, address in zip(nodes, reached, strict=True)
    }.items():
        there: list[Network] = node.ask(list[Network], "networks")
        own = [each for each in there if each.address == address]
        if not own:
            return [], []
        if own[0].network not in networks:
            networks.append(own[0].network)
        words.append(f"{name}: {own[0].interface} {address}")
    return networks, words
