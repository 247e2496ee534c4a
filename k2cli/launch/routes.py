"""Choose the addresses by which the ranks of a launch reach each other, for each transport."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import msgspec

from k2cli.agent.networks import Network
from k2cli.choices import Transport
from k2cli.cluster.links import common_addresses, to_hostfile
from k2cli.errors import ClusterError, UsageError
from k2cli.launch.nccl import NcclRoute, nccl_route
from k2cli.nodes.node import Node, addresses

if TYPE_CHECKING:
    from k2cli.cluster.description import Cluster


@dataclass(frozen=True, slots=True)
class Routes:
    """Addresses and devices of a run; ``reached``, ``ring`` and ``rdma`` have one entry per rank.

    ``reached`` are the addresses of the guards and the leader rank, ``ring`` those on which each
    rank listens for the one before it, ``rdma`` each rank's device towards each other rank.
    ``nccl`` has the addresses of NCCL, if it is used. ``networks`` are those between the nodes,
    ``interfaces`` the node's interfaces in words.
    """

    reached: list[str]
    ring: list[str]
    rdma: list[list[str | list[str] | None]] | None = None
    nccl: NcclRoute | None = None
    networks: list[str] = field(default_factory=list)
    interfaces: list[str] = field(default_factory=list)


def find_routes(nodes: Sequence[Node], transport: Transport, cluster: Cluster | None) -> Routes:
    """Choose addresses, and devices for JACCL, by the cluster's description, else by ssh's names.

    Raises:
        UsageError: if JACCL is wanted without a cluster's description, which names the devices.
        ClusterError: if two neighbours have no link, a node has no IPv4 address where MLX needs
            one, or a node cannot be asked.
    """
    described = _described(nodes, cluster)
    if transport == "jaccl" and described is None:
        raise UsageError(
            "--backend jaccl needs a described cluster, which names the RDMA device of each link",
            f"k2 cluster init {' '.join(node.name for node in nodes)} --name NAME, then --cluster",
        )
    reached, ring = _addresses(nodes, transport, described)
    if transport in ("ring", "jaccl"):
        _refuse_ipv6(nodes, ring if transport == "ring" else reached[:1], transport)
    nccl = nccl_route(nodes, reached) if transport == "nccl" else None
    if all(node.is_local for node in nodes):
        return Routes(reached, ring, nccl=nccl)

    networks, interfaces = _link_networks(nodes, reached)
    rdma = None
    if transport == "jaccl" and described is not None:
        # JACCL makes a ring of devices towards neighbours alone; pipelines and sums need no more.
        imported = described.hostfile.backend if described.hostfile is not None else ""
        hosts = to_hostfile(described, imported if imported == "jaccl-ring" else "jaccl").hosts
        rdma = [[_as_list(device) for device in host.rdma] for host in hosts]
    return Routes(reached, ring, rdma, nccl, networks, interfaces)


def _described(nodes: Sequence[Node], cluster: Cluster | None) -> Cluster | None:
    """Return the cluster reduced to these nodes; None if it lacks one, or one repeats."""
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
        return reached, reached  # the description has no addresses
    ring = [host.ips[0] if host.ips else at for host, at in zip(hosts, reached, strict=True)]
    return reached, ring


def _refuse_ipv6(nodes: Sequence[Node], addresses: Sequence[str], transport: str) -> None:
    """Refuse addresses at which MLX's ring and JACCL cannot listen: they have IPv4 sockets only."""
    for node, address in zip(nodes, addresses, strict=False):
        if ":" in address:
            raise ClusterError(
                f"{node.name} is reached at {address}, and MLX's {transport} speaks IPv4 only",
                "give both machines IPv4 addresses on that link; or without it: --backend mpi",
            )


def _as_list(device: str | tuple[str, ...] | None) -> str | list[str] | None:
    return list(device) if isinstance(device, tuple) else device


def _link_networks(nodes: Sequence[Node], reached: Sequence[str]) -> tuple[list[str], list[str]]:
    """Find the networks by which nodes reach each other, and the interfaces that they use.

    Args:
        nodes: one per rank.
        reached: the address of each.

    Returns:
        Networks in CIDR notation, each once, and ``node: interface address`` for each node. Both
        are empty if an address is not one of the machine's own (behind NAT).

    Raises:
        ClusterError: if a node cannot be asked.
    """
    networks: list[str] = []
    interfaces: list[str] = []
    for name, (node, address) in {
        node.name: (node, address) for node, address in zip(nodes, reached, strict=True)
    }.items():
        there: list[Network] = node.ask(list[Network], "networks")
        own = [each for each in there if each.address == address]
        if not own:
            return [], []
        if own[0].network not in networks:
            networks.append(own[0].network)
        interfaces.append(f"{name}: {own[0].interface} {address}")
    return networks, interfaces
