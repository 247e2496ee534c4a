"""Networks of this machine, from its own addresses.

Open MPI is given a link as a network, because its interface has another name on each machine.
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
    """Return all IPv4 networks of this machine."""
    found = []
    for interface, addresses in psutil.net_if_addrs().items():
        for each in addresses:
            if each.family == socket.AF_INET and each.netmask:
                whole = ipaddress.ip_interface(f"{each.address}/{each.netmask}")
                found.append(Network(interface, each.address, str(whole.network)))
    return found
