"""NCCL as the transport of a launch: when it is possible, and where it listens.

MLX's NCCL has sums and gathers but no send, so it carries tensor parallelism only. It needs one
NVIDIA GPU per rank. Measured on two H200s of one host: a sum of 14 KB took 48 us, and 833 us over
MLX's ring, which brings every array from the GPU to the CPU and back.
"""

from __future__ import annotations

import ipaddress
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from k2cli.agent.nccl import Nccl
from k2cli.agent.networks import Network
from k2cli.choices import Parallel
from k2cli.errors import ClusterError, UsageError
from k2cli.nodes.node import Node

OTHER_TRANSPORT = "--backend ring"
_LOOPBACK = "lo"


def nccl_obstacle(nodes: Sequence[Node], parallel: Parallel) -> str | None:
    """Return the reason that NCCL cannot connect these ranks; None if it can.

    Raises:
        ClusterError: if a node cannot be asked.
    """
    if parallel == "pipeline":
        return "MLX's NCCL cannot send from rank to rank, which a pipeline needs"
    ranks = Counter(node.name for node in nodes)
    for node in {node.name: node for node in nodes}.values():
        found: Nccl = node.ask(Nccl, "nccl")
        if found.obstacle is not None:
            return f"{node.name}: {found.obstacle}"
        if found.gpus < ranks[node.name]:
            return (
                f"{node.name} has {found.gpus} GPU(s) for {ranks[node.name]} ranks, and NCCL needs "
                "one for each"
            )
    return None


def check_nccl(nodes: Sequence[Node], parallel: Parallel) -> None:
    """Refuse NCCL where it cannot work.

    Raises:
        UsageError: with the reason, and another transport.
    """
    obstacle = nccl_obstacle(nodes, parallel)
    if obstacle is not None:
        raise UsageError(f"--backend nccl is not possible: {obstacle}", OTHER_TRANSPORT)


def suits_nccl(nodes: Sequence[Node], parallel: Parallel) -> bool:
    """True if ``auto`` should take NCCL: several GPUs of one machine, a rank on each.

    Between machines it has not been measured against the ring, so there it must be asked for.
    """
    one_machine = len({node.name for node in nodes}) == 1
    return len(nodes) > 1 and one_machine and nccl_obstacle(nodes, parallel) is None


REASON = (
    "a GPU of one machine for each rank; a small sum takes NCCL 48 us and the ring 833 us "
    "(two H200s)"
)


@dataclass(frozen=True, slots=True)
class NcclRoute:
    """Addresses of NCCL: the leader's, and each rank's network interface."""

    host: str
    interfaces: list[str]


def nccl_route(nodes: Sequence[Node], reached: Sequence[str]) -> NcclRoute:
    """Choose where NCCL listens: loopback on one machine, else the interface of each address.

    Args:
        nodes: one per rank.
        reached: the address of each rank.

    Raises:
        ClusterError: if an address is not one of its machine's own IPv4 addresses.
    """
    if all(_is_loopback(address) for address in reached):
        return NcclRoute(reached[0], [_LOOPBACK] * len(nodes))
    networks: dict[str, list[Network]] = {
        node.name: node.ask(list[Network], "networks") for node in nodes
    }
    interfaces = []
    for node, address in zip(nodes, reached, strict=True):
        own = [each.interface for each in networks[node.name] if each.address == address]
        if not own:
            raise ClusterError(
                f"{address} is not an IPv4 address of {node.name}, and NCCL needs one to listen on",
                OTHER_TRANSPORT,
            )
        interfaces.append(own[0])
    return NcclRoute(reached[0], interfaces)


def _is_loopback(address: str) -> bool:
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return False
