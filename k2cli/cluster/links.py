"""Links between machines: found in the machines' facts, and chosen for a transport.

A Thunderbolt cable is recognised by the domain UUIDs at its ends. Other links follow from
addresses: two machines with addresses in one network are assumed to reach each other through these
interfaces. The doctor tests them.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator, Mapping
from itertools import combinations

from k2cli.cluster.description import Cluster, Link, LinkKind
from k2cli.cluster.facts.machine import MachineFacts, thunderbolt_links
from k2cli.cluster.hostfile import Host, Hostfile
from k2cli.errors import ClusterError, UsageError

_SPEED_ORDER: tuple[LinkKind, ...] = ("thunderbolt", "ethernet", "other", "wifi")
# Assumed for an address whose prefix length is unknown.
_USUAL_PREFIX = {4: 24, 6: 64}
RDMA_TRANSPORTS = ("jaccl", "jaccl-ring")


# --- finding ------------------------------------------------------------------------------------


def detect_links(machines: Mapping[str, MachineFacts]) -> tuple[Link, ...]:
    """Find all links between the machines, the fastest of each pair first."""
    cables = thunderbolt_links(machines)
    found = [_cable(machines, *cable) for cable in cables]
    cabled = {(name, interface) for cable in cables for name, interface in _ends(cable)}
    joined = {frozenset((cable[0], cable[2])) for cable in cables}
    for first, second in combinations(machines, 2):
        for link in _networks(machines, first, second):
            ends = {(first, link.first_interface), (second, link.second_interface)}
            bridged = link.kind == "thunderbolt" and frozenset((first, second)) not in joined
            if not ends & cabled and not bridged:
                found.append(link)
    order = {pair: index for index, pair in enumerate(combinations(machines, 2))}
    return tuple(sorted(found, key=lambda link: (order[link.first, link.second], _slowness(link))))


def _ends(cable: tuple[str, str, str, str]) -> tuple[tuple[str, str], tuple[str, str]]:
    return (cable[0], cable[1]), (cable[2], cable[3])


def _cable(
    machines: Mapping[str, MachineFacts], first: str, interface: str, second: str, other: str
) -> Link:
    pairs = _in_one_network(machines[first], interface, machines[second], other)
    addresses = next(pairs, (None, None))
    devices = (f"rdma_{interface}", f"rdma_{other}")
    rdma = (
        devices[0] in machines[first].rdma_devices and devices[1] in machines[second].rdma_devices
    )
    named = devices if rdma else (None, None)
    return Link(
        first, second, "thunderbolt", interface, addresses[0], other, addresses[1], rdma, *named
    )


def _networks(machines: Mapping[str, MachineFacts], first: str, second: str) -> Iterator[Link]:
    one, two = machines[first], machines[second]
    for interface in one.interfaces:
        for other in two.interfaces:
            kinds = (one.interface_kinds.get(interface), two.interface_kinds.get(other))
            if "loopback" in kinds:
                continue
            addresses = next(_in_one_network(one, interface, two, other), None)
            if addresses is not None:
                kind = _slower_kind(kinds)
                yield Link(first, second, kind, interface, addresses[0], other, addresses[1])


def _in_one_network(
    one: MachineFacts, interface: str, two: MachineFacts, other: str
) -> Iterator[tuple[str, str]]:
    for address in one.interfaces.get(interface, ()):
        for peer in two.interfaces.get(other, ()):
            # An address that both have belongs to a separate network on each (docker0).
            if address != peer and _network(one, address) == _network(two, peer):
                yield address, peer


def _network(machine: MachineFacts, address: str) -> object:
    version = 6 if ":" in address else 4
    prefix = machine.prefix_lengths.get(address, _USUAL_PREFIX[version])
    try:
        return ipaddress.ip_interface(f"{address}/{prefix}").network
    except ValueError:  # a machine may report anything; this is in no network
        return address


def _slower_kind(kinds: tuple[str | None, str | None]) -> LinkKind:
    known = [kind for kind in _SPEED_ORDER if kind in kinds]
    if len(known) == 2 and "thunderbolt" in known:
        return "other"  # a bridge between the two, of unknown speed
    return known[-1] if known else "other"


def _slowness(link: Link) -> tuple[bool, int, bool]:
    return not link.rdma, _SPEED_ORDER.index(link.kind), link.first_address is None


def same_machines(cluster: Cluster) -> list[tuple[str, str]]:
    """Find pairs of nodes that have the same addresses: one machine under two names."""
    found = {
        node.name: {
            address
            for interface, addresses in node.interfaces.items()
            if node.interface_kinds.get(interface) != "loopback"
            for address in addresses
        }
        for node in cluster.nodes
    }
    return [
        (one, two) for one, two in combinations(found, 2) if found[one] and found[one] == found[two]
    ]


# --- choosing -----------------------------------------------------------------------------------


def links_between(cluster: Cluster, first: str, second: str, transport: str = "") -> list[Link]:
    """List the links of two nodes that a transport can use, fastest first, seen from ``first``.

    ``jaccl`` needs RDMA; ``ring`` and ``mpi`` need addresses.
    """
    found = [
        link if link.first == first else link.turned()
        for link in cluster.links
        if {link.first, link.second} == {first, second}
    ]
    if transport in RDMA_TRANSPORTS:
        found = [link for link in found if link.rdma]
    elif transport:
        found = [link for link in found if link.first_address and link.second_address]
    return sorted(found, key=_slowness)


def best_links(cluster: Cluster, transport: str = "") -> list[Link]:
    """Choose for each pair of nodes the fastest link that the transport can use, if any."""
    names = [node.name for node in cluster.nodes]
    pairs = (links_between(cluster, one, two, transport) for one, two in combinations(names, 2))
    return [links[0] for links in pairs if links]


def common_addresses(cluster: Cluster) -> dict[str, str]:
    """Choose one address per node at which all others reach it, over the fastest kind of link.

    Empty if no kind of link joins all pairs.
    """
    names = [node.name for node in cluster.nodes]
    for kind in _SPEED_ORDER:
        found: dict[str, set[str]] = {}
        for one in names:
            others = [name for name in names if name != one]
            sets = [_addresses_towards(cluster, one, other, kind) for other in others]
            found[one] = set.intersection(*sets) if sets else set()
        if names and all(found.values()):
            return {name: min(addresses, key=_plainness) for name, addresses in found.items()}
    return {}


def _plainness(address: str) -> tuple[bool, str]:
    return ":" in address, address  # IPv4 first; always the same one


def _addresses_towards(cluster: Cluster, one: str, other: str, kind: LinkKind) -> set[str]:
    links = links_between(cluster, one, other, "ring")
    return {link.first_address for link in links if link.kind == kind and link.first_address}


# --- MLX's hostfile -----------------------------------------------------------------------------


def to_hostfile(cluster: Cluster, transport: str = "") -> Hostfile:
    """Make MLX's hostfile for a cluster; an imported hostfile is returned unchanged.

    Args:
        cluster: the cluster.
        transport: ``jaccl``, ``ring``, ``mpi``, or empty for the imported one or the best one.

    Raises:
        ClusterError: if two nodes have no link that the transport can use.
    """
    if cluster.hostfile is not None and transport in ("", cluster.hostfile.backend):
        return cluster.hostfile
    if transport not in ("", "jaccl", "ring", "mpi"):
        raise UsageError(
            f"'{transport}' is not a transport of a hostfile",
            "--backend ring, or --backend jaccl, or --backend mpi",
        )
    names = [node.name for node in cluster.nodes]
    transport = transport or _best_transport(cluster)
    if cluster.hostfile is not None and len(cluster.rank_nodes) > len(names):
        return _with_repeated_hosts(cluster.hostfile, transport)
    rdma = [_rdma_row(cluster, name) if transport == "jaccl" else () for name in names]
    hosts = [
        Host(_ssh_name(cluster, name), _ring_addresses(cluster, index, transport), rdma[index])
        for index, name in enumerate(names)
    ]
    return Hostfile(tuple(hosts), transport)


def _with_repeated_hosts(hostfile: Hostfile, transport: str) -> Hostfile:
    """Return an imported hostfile, in which a host has several ranks, for another transport."""
    if transport == "jaccl":
        raise ClusterError("RDMA does not join two ranks of one machine", "--backend ring")
    hosts = tuple(Host(host.ssh, host.ips) for host in hostfile.hosts)
    return Hostfile(hosts, transport, hostfile.envs)


def _ssh_name(cluster: Cluster, name: str) -> str:
    # "localhost" is another machine for the reader of the file.
    node = cluster.node(name)
    return node.hostname if node and name == "localhost" and node.hostname else name


def _best_transport(cluster: Cluster) -> str:
    pairs = len(cluster.nodes) * (len(cluster.nodes) - 1) // 2
    return "jaccl" if pairs and len(best_links(cluster, "jaccl")) == pairs else "ring"


def _rdma_row(cluster: Cluster, name: str) -> tuple[str | None, ...]:
    row: list[str | None] = []
    for other in cluster.nodes:
        links = [] if other.name == name else links_between(cluster, name, other.name, "jaccl")
        if other.name != name and not links:
            raise ClusterError(
                f"there is no RDMA link between {name} and {other.name}", "--backend ring"
            )
        row.append(links[0].first_rdma_device if links else None)
    return tuple(row)


def _ring_addresses(cluster: Cluster, rank: int, transport: str) -> tuple[str, ...]:
    """Return the addresses at which a rank listens for its left neighbour."""
    names = [node.name for node in cluster.nodes]
    if len(names) == 1:
        return ("127.0.0.1",)
    common = common_addresses(cluster)
    if transport != "ring" and names[rank] in common:
        return (common[names[rank]],)
    links = links_between(cluster, names[rank], names[rank - 1], "ring")
    if not links:
        raise ClusterError(
            f"no network is known that joins {names[rank]} and {names[rank - 1]}",
            f"k2 doctor {cluster.name}",
        )
    return (str(links[0].first_address),)
