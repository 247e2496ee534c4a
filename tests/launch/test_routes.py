"""Addresses by which MLX's transports join ranks: its ring and JACCL have IPv4 sockets only."""

from __future__ import annotations

import socket
from types import SimpleNamespace
from typing import Any, cast

import pytest

from k2cli.choices import Transport
from k2cli.cluster.discovery import cluster_from_hostfile
from k2cli.cluster.hostfile import Host, Hostfile
from k2cli.errors import ClusterError
from k2cli.launch.routes import find_routes
from k2cli.nodes import ssh
from k2cli.nodes.node import Node
from k2cli.nodes.ssh import SshNode


def test_a_name_with_both_kinds_of_addresses_is_reached_by_ipv4(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    answers = [
        (socket.AF_INET6, socket.SOCK_STREAM, 6, "", ("fe80::1%en0", 0, 0, 4)),
        (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("192.168.1.7", 0)),
    ]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: answers)
    host = SimpleNamespace(configuration={"hostname": "studio-2.local"})
    monkeypatch.setattr(ssh, "connection_to", lambda name: host)
    ssh._resolved.cache_clear()
    try:
        assert SshNode("studio-2").address() == "192.168.1.7"
        del answers[1]
        ssh._resolved.cache_clear()
        assert SshNode("studio-2").address() == "fe80::1%en0"
    finally:
        ssh._resolved.cache_clear()


@pytest.mark.parametrize("transport", ["ring", "mpi"])
def test_a_node_without_ipv4_is_refused_where_mlx_needs_it(transport: Transport) -> None:
    nodes = [_node("studio-1", "10.0.0.1"), _node("studio-2", "fd00::2")]
    if transport == "mpi":
        assert find_routes(nodes, transport, None).reached == ["10.0.0.1", "fd00::2"]
        return
    with pytest.raises(ClusterError, match=r"studio-2 is reached at fd00::2.*IPv4 only") as caught:
        find_routes(nodes, transport, None)
    assert "--backend mpi" in (caught.value.hint or "")


def _node(name: str, address: str) -> Node:
    def ask(*_: Any) -> list[Any]:
        return []

    return cast(Node, SimpleNamespace(name=name, is_local=False, address=lambda: address, ask=ask))


def test_devices_of_an_imported_ring_are_used_as_they_are() -> None:
    names = ["a", "b", "c", "d"]
    rows = [
        [["rdma_en3"] if abs(one - other) in (1, 3) else None for other in range(4)]
        for one in range(4)
    ]
    hosts = tuple(
        Host(name, (f"10.0.0.{index}",), tuple(tuple(each) if each else None for each in row))
        for index, (name, row) in enumerate(zip(names, rows, strict=True))
    )
    described = cluster_from_hostfile("four", Hostfile(hosts, "jaccl-ring"))
    nodes = [_node(name, f"10.0.0.{index}") for index, name in enumerate(names)]
    assert find_routes(nodes, "jaccl", described).rdma == rows
    with pytest.raises(ClusterError, match="no RDMA link between a and c"):
        find_routes([nodes[0], nodes[2]], "jaccl", described)
