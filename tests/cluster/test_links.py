"""Links of machines: found by cable and by network, and chosen for a transport."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
from mlx._distributed_utils.common import Hostfile as MlxHostfile

from k2cli.cluster.description import (
    Cluster,
)
from k2cli.cluster.discovery import describe_node
from k2cli.cluster.facts.machine import InterfaceKind, MachineFacts, ThunderboltPort
from k2cli.cluster.hostfile import format_hostfile
from k2cli.cluster.links import (
    best_links,
    common_addresses,
    detect_links,
    same_machines,
    to_hostfile,
)
from k2cli.errors import ClusterError
from k2cli.units import GIB


def read_with_mlx(path: Path) -> MlxHostfile:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # it leaves the file open
        return MlxHostfile.from_file(path)


def _mac(name: str, addresses: dict[str, str], cables: dict[str, tuple[str, str]]) -> MachineFacts:
    """A Mac: interface -> address/bits, and Thunderbolt interface -> (own domain, peer's)."""
    kinds: dict[str, InterfaceKind] = {"en0": "ethernet", "en1": "wifi", "lo0": "loopback"}
    ports = tuple(
        ThunderboltPort(str(number), interface, own, peer, None, "80 Gb/s")
        for number, (interface, (own, peer)) in enumerate(cables.items())
    )
    return MachineFacts(
        hostname=f"{name}.local",
        os_name="macos",
        os_version="26.3",
        model="Mac15,14",
        chip="Apple M3 Ultra",
        memory_bytes=512 * GIB,
        limit_bytes=464 * GIB,
        limit_mark="exact",
        limit_source="asked",
        backend="metal",
        bandwidth_bytes_per_second=None,
        interfaces={"lo0": ("127.0.0.1",)}
        | {interface: (text.split("/")[0],) for interface, text in addresses.items()},
        interface_kinds={name: kinds.get(name, "thunderbolt") for name in ["lo0", *addresses]},
        thunderbolt_ports=ports,
        rdma_devices=tuple(f"rdma_{interface}" for interface in cables),
        prefix_lengths={text.split("/")[0]: int(text.split("/")[1]) for text in addresses.values()},
    )


def make_cluster(machines: dict[str, MachineFacts]) -> Cluster:
    nodes = tuple(describe_node(name, facts, None) for name, facts in machines.items())
    return Cluster("macs", nodes, detect_links(machines))


PAIR = {
    "a": _mac("a", {"en0": "10.0.1.1/16", "en5": "192.168.0.1/30"}, {"en5": ("A5", "B4")}),
    "b": _mac("b", {"en0": "10.0.2.2/16", "en4": "192.168.0.2/30"}, {"en4": ("B4", "A5")}),
}


def test_links_are_found_by_cable_and_by_network() -> None:
    first, second = detect_links(PAIR)
    assert (first.kind, first.first_interface, first.second_interface) == (
        "thunderbolt",
        "en5",
        "en4",
    )
    assert (first.first_address, first.second_address) == ("192.168.0.1", "192.168.0.2")
    assert (first.rdma, first.first_rdma_device) == (True, "rdma_en5")
    assert (second.kind, second.first_address, second.rdma) == ("ethernet", "10.0.1.1", False)


def test_networks_that_only_look_alike_are_no_links() -> None:
    machines = {
        # Two /30 networks inside one /24; the same address on both, as docker0 has it; Wi-Fi.
        "a": _mac("a", {"en5": "192.168.0.1/30", "en7": "172.17.0.1/16", "en1": "10.0.0.1/24"}, {}),
        "b": _mac("b", {"en5": "192.168.0.5/30", "en7": "172.17.0.1/16", "en1": "10.0.0.2/24"}, {}),
    }
    (link,) = detect_links(machines)
    assert (link.kind, link.first_interface) == ("wifi", "en1")
    # Thunderbolt Bridge gives out addresses by itself: without a cable they mean nothing.
    apart = {name: _mac(name, {"bridge0": f"169.254.1.{ord(name)}/16"}, {}) for name in "ab"}
    assert detect_links(apart) == ()


def test_one_machine_under_two_names_is_noticed() -> None:
    assert same_machines(make_cluster(PAIR)) == []
    assert same_machines(make_cluster(PAIR | {"again": PAIR["b"]})) == [("b", "again")]


def test_rdma_needs_no_address_and_the_ring_does() -> None:
    machines = {
        "a": _mac("a", {"en0": "10.0.0.1/24"}, {"en5": ("A5", "B4")}),
        "b": _mac("b", {"en0": "10.0.0.2/24"}, {"en4": ("B4", "A5")}),
    }
    cluster = make_cluster(machines)
    (jaccl,) = best_links(cluster, "jaccl")
    (ring,) = best_links(cluster, "ring")
    assert (jaccl.kind, jaccl.first_address) == ("thunderbolt", None)
    assert (ring.kind, ring.second_address) == ("ethernet", "10.0.0.2")
    assert common_addresses(cluster) == {"a": "10.0.0.1", "b": "10.0.0.2"}


def test_a_pair_of_macs_is_exported_for_jaccl_as_mlx_reads_it(tmp_path: Path) -> None:
    path = tmp_path / "hosts.json"
    path.write_text(format_hostfile(to_hostfile(make_cluster(PAIR))))
    read = read_with_mlx(path)
    assert read.backend == "jaccl"
    assert [host.rdma for host in read.hosts] == [[None, "rdma_en5"], ["rdma_en4", None]]
    ring = json.loads(format_hostfile(to_hostfile(make_cluster(PAIR), "ring")))
    assert [host["ips"] for host in ring["hosts"]] == [["192.168.0.1"], ["192.168.0.2"]]


def test_each_rank_of_a_ring_listens_towards_its_left_neighbour() -> None:
    """Three Macs in a triangle of cables: no address is reached by both others."""
    triangle = {
        "a": _mac("a", {"en3": "10.1.0.1/30", "en4": "10.2.0.1/30"}, {}),
        "b": _mac("b", {"en3": "10.1.0.2/30", "en4": "10.3.0.1/30"}, {}),
        "c": _mac("c", {"en3": "10.2.0.2/30", "en4": "10.3.0.2/30"}, {}),
    }
    kinds: dict[str, InterfaceKind] = {"en3": "ethernet", "en4": "ethernet"}
    for facts in triangle.values():
        object.__setattr__(facts, "interface_kinds", kinds)
    cluster = make_cluster(triangle)
    assert common_addresses(cluster) == {}
    exported = to_hostfile(cluster, "ring")
    assert [host.ips for host in exported.hosts] == [("10.2.0.1",), ("10.1.0.2",), ("10.3.0.2",)]
    with pytest.raises(ClusterError, match="no RDMA link between a and b"):
        to_hostfile(cluster, "jaccl")
