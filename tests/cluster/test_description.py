"""Descriptions of clusters: files, links found and chosen, and MLX's hostfile there and back."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
from mlx._distributed_utils.common import Host as MlxHost
from mlx._distributed_utils.common import Hostfile as MlxHostfile

from k2cli.agent.activity import RunActivity
from k2cli.agent.locks import Claim, Lock
from k2cli.cluster.description import (
    Cluster,
    cluster_path,
    list_clusters,
    load_cluster,
    node_memory,
    remove_cluster,
    save_cluster,
)
from k2cli.cluster.discovery import NodeActivity, cluster_from_hostfile, describe_node
from k2cli.cluster.facts.machine import InterfaceKind, MachineFacts, ThunderboltPort
from k2cli.cluster.hostfile import format_hostfile, parse_hostfile, read_hostfile
from k2cli.cluster.links import (
    best_links,
    common_addresses,
    detect_links,
    same_machines,
    to_hostfile,
)
from k2cli.cluster.node_lookup import cluster_nodes
from k2cli.errors import ClusterError, UsageError
from k2cli.ui.cluster_view import print_cluster
from k2cli.units import GIB


def _read_with_mlx(path: Path) -> MlxHostfile:
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


def _cluster(machines: dict[str, MachineFacts]) -> Cluster:
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
    assert same_machines(_cluster(PAIR)) == []
    assert same_machines(_cluster(PAIR | {"again": PAIR["b"]})) == [("b", "again")]


def test_rdma_needs_no_address_and_the_ring_does() -> None:
    machines = {
        "a": _mac("a", {"en0": "10.0.0.1/24"}, {"en5": ("A5", "B4")}),
        "b": _mac("b", {"en0": "10.0.0.2/24"}, {"en4": ("B4", "A5")}),
    }
    cluster = _cluster(machines)
    (jaccl,) = best_links(cluster, "jaccl")
    (ring,) = best_links(cluster, "ring")
    assert (jaccl.kind, jaccl.first_address) == ("thunderbolt", None)
    assert (ring.kind, ring.second_address) == ("ethernet", "10.0.0.2")
    assert common_addresses(cluster) == {"a": "10.0.0.1", "b": "10.0.0.2"}


def test_a_pair_of_macs_is_exported_for_jaccl_as_mlx_reads_it(tmp_path: Path) -> None:
    path = tmp_path / "hosts.json"
    path.write_text(format_hostfile(to_hostfile(_cluster(PAIR))))
    read = _read_with_mlx(path)
    assert read.backend == "jaccl"
    assert [host.rdma for host in read.hosts] == [[None, "rdma_en5"], ["rdma_en4", None]]
    ring = json.loads(format_hostfile(to_hostfile(_cluster(PAIR), "ring")))
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
    cluster = _cluster(triangle)
    assert common_addresses(cluster) == {}
    exported = to_hostfile(cluster, "ring")
    assert [host.ips for host in exported.hosts] == [("10.2.0.1",), ("10.1.0.2",), ("10.3.0.2",)]
    with pytest.raises(ClusterError, match="no RDMA link between a and b"):
        to_hostfile(cluster, "jaccl")


@pytest.mark.parametrize(
    "document",
    [
        MlxHostfile(
            [
                MlxHost(0, "a", ["10.0.0.1"], [None, ["rdma_en2", "rdma_en3"], "rdma_en4"]),
                MlxHost(1, "user@b", ["10.0.0.2", "10.1.0.2"], ["rdma_en2", None, "rdma_en3"]),
                MlxHost(2, "c", [], ["rdma_en2", "rdma_en3", None]),
            ],
            "jaccl-ring",
            ["MLX_METAL_FAST_SYNCH=1"],
        ).to_json(),
        MlxHostfile.from_list("a,b,10.0.0.3", repeats=2).to_json(),
        [{"ssh": "a", "ips": ["10.0.0.1"]}, {"ssh": "b"}],
    ],
    ids=["jaccl-ring", "repeated", "bare-list"],
)
def test_mlx_hostfiles_come_back_as_they_went(document: Any, tmp_path: Path) -> None:
    given, back = tmp_path / "given.json", tmp_path / "back.json"
    given.write_text(json.dumps(document))
    save_cluster(cluster_from_hostfile("x", read_hostfile(given)))
    back.write_text(format_hostfile(to_hostfile(load_cluster("x"))))
    assert _read_with_mlx(back).to_json() == _read_with_mlx(given).to_json()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not an MLX hostfile"),
        ('{"hosts": [{"ips": []}]}', "missing required field `ssh`"),
        ('{"hosts": []}', "names no host"),
        ('[{"ssh": "-oProxyCommand=x"}]', "cannot be the name of a host"),
        ('[{"ssh": "a", "rdma": [null]}, {"ssh": "b"}]', "1 RDMA entries for 2 hosts"),
        ("\xff", "is not an MLX hostfile"),
    ],
)
def test_what_is_no_hostfile_is_refused(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_hostfile(text.encode("latin-1"), "hosts.json")


def test_clusters_are_saved_and_the_only_one_needs_no_name() -> None:
    with pytest.raises(UsageError, match="there is no cluster yet"):
        load_cluster()
    cluster = _cluster(PAIR)
    save_cluster(cluster)
    assert load_cluster() == cluster
    assert [node.name for node in cluster_nodes(cluster)] == ["a", "b"]
    assert [node.address() for node in cluster_nodes(cluster)] == ["192.168.0.1", "192.168.0.2"]
    memory = node_memory(cluster)
    assert [node.limit_bytes for node in memory] == [464 * GIB] * 2
    assert memory[0].bandwidth_bytes_per_second == 819_000_000_000
    save_cluster(Cluster("other", cluster.nodes[:1]))
    assert list_clusters() == ["macs", "other"]
    with pytest.raises(UsageError, match="there are several clusters") as raised:
        load_cluster()
    assert raised.value.hint == "known clusters: macs, other"
    remove_cluster("other")
    assert list_clusters() == ["macs"]


def test_damaged_foreign_and_missing_descriptions_are_told_apart() -> None:
    with pytest.raises(UsageError, match=r"'\.\./x' cannot be the name of a cluster"):
        load_cluster("../x")
    with pytest.raises(UsageError, match="there is no cluster 'none'"):
        load_cluster("none")
    path = save_cluster(_cluster(PAIR))
    path.write_text(path.read_text().replace('"schema_version": 1', '"schema_version": 2'))
    with pytest.raises(ClusterError, match="written by a newer k2"):
        load_cluster("macs")
    cluster_path("macs").write_text('{"name": 3}')
    with pytest.raises(ClusterError, match="is not a description of a cluster"):
        load_cluster("macs")
    bare = cluster_from_hostfile("bare", parse_hostfile(b'[{"ssh": "a"}]', "hosts.json"))
    with pytest.raises(ClusterError, match="the memory size of a is not known") as raised:
        node_memory(bare)
    assert raised.value.hint == "k2 cluster refresh bare"


def test_a_pair_of_macs_as_it_is_drawn(capsys: pytest.CaptureFixture[str]) -> None:
    cluster = _cluster(PAIR)
    lock = Lock(Claim("k2-thinking-1a2b", "eve", "c.local", 7, 0.0), "held")
    running = {"a": NodeActivity((RunActivity("k2-thinking-1a2b", 2, 290_000_000_000),), (lock,))}
    print_cluster(cluster, running, {"b": "node b cannot be reached: Connection refused"})
    assert capsys.readouterr().out == DRAWN


DRAWN = """\
macs: 2 nodes, MLX may use 928.0 GiB in all

● a (a.local)
│ Apple M3 Ultra, macOS 26.3
│ 512.0 GiB of memory, MLX may use 464.0 GiB (metal), reads 819.0 GB/s
│ taken by k2-thinking-1a2b of eve from c.local
│ runs k2-thinking-1a2b: 2 processes, 290.0 GB
├─ thunderbolt, RDMA: en5 192.168.0.1 ── en4 192.168.0.2 → b
├─ ethernet: en0 10.0.1.1 ── en0 10.0.2.2 → b

● b (b.local)
│ Apple M3 Ultra, macOS 26.3
│ 512.0 GiB of memory, MLX may use 464.0 GiB (metal), reads 819.0 GB/s
│ node b cannot be reached: Connection refused
"""
