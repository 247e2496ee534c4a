"""The networks that a machine is on, by its own addresses: how a link is named to Open MPI.

The same network has another interface name on each machine, so a link is given as a network.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Sequence

import msgspec
import psutil

from k2cli.nodes.node import Node


class Network(msgspec.Struct, frozen=True):
    """One address of a machine, its interface, and the network in CIDR notation."""

    interface: str
    address: str
    network: str


def own_networks() -> list[Network]:
    """All IPv4 networks of this machine."""
    found = []
    for interface, addresses in psutil.net_if_addrs().items():
        for each in addresses:
            if each.family == socket.AF_INET and each.netmask:
                whole = ipaddress.ip_interface(f"{each.address}/{each.netmask}")
                found.append(Network(interface, each.address, str(whole.network)))
    return found


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
