"""The networks that a machine is on, by its own addresses: how a link is named to Open MPI.

The same network has another interface name on each machine, so a link is given as a network.
"""

from __future__ import annotations

import ipaddress
import socket

import msgspec
import psutil


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
