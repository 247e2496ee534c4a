"""Hostfiles of other launchers: MLX's JSON with repeated hosts and RDMA, and Open MPI's lines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from k2cli.cluster.discovery import cluster_from_hostfile
from k2cli.cluster.hostfile import parse_hostfile, read_hostfile
from k2cli.cluster.links import to_hostfile
from k2cli.errors import UsageError
from k2cli.launch.prepare import _node_names
from k2cli.launch.request import LaunchRequest


def _jaccl(*rows: list[Any], backend: str = "jaccl") -> bytes:
    names = "abcdefgh"
    hosts = [{"ssh": names[rank], "ips": [], "rdma": row} for rank, row in enumerate(rows)]
    return json.dumps({"backend": backend, "hosts": hosts}).encode()


def _names(text: bytes) -> list[str]:
    return [host.ssh for host in parse_hostfile(text, "hosts").hosts]


def test_a_host_that_is_listed_twice_has_two_ranks() -> None:
    # mlx#1810: mlx.launch makes two ranks of it.
    hosts = [{"ssh": "127.0.0.1", "ips": ["127.0.0.1"]}] * 2
    cluster = cluster_from_hostfile("twice", parse_hostfile(json.dumps(hosts).encode(), "hosts"))
    assert [node.name for node in cluster.nodes] == ["localhost"]
    assert [node.name for node in cluster.rank_nodes] == ["localhost", "localhost"]


def test_ranks_of_one_host_are_exported_for_other_transports() -> None:
    cluster = cluster_from_hostfile("two", parse_hostfile(b"localhost slots=2\n", "hosts"))
    for transport in ("ring", "mpi"):
        assert [host.ssh for host in to_hostfile(cluster, transport).hosts] == ["localhost"] * 2


@pytest.mark.parametrize("address", ["evil;rm -rf", "a b", ""])
def test_what_cannot_be_an_address_is_refused(address: str) -> None:
    text = json.dumps([{"ssh": "a", "ips": [address]}]).encode()
    with pytest.raises(UsageError, match="is not an address"):
        parse_hostfile(text, "hosts")


def test_ranks_of_a_launch_are_in_the_order_of_the_hostfile(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hosts = [{"ssh": name} for name in ("b", "a", "b")]
    cluster = cluster_from_hostfile("c", parse_hostfile(json.dumps(hosts).encode(), "hosts"))

    class Run:
        request = LaunchRequest("demo", cluster="c")
        plan_given = None

    run = Run()
    run.cluster = cluster  # type: ignore[attr-defined]
    assert _node_names(run) == ["b", "a", "b"]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "names"),
    [
        (b"node-a slots=1\nnode-b slots=1\n", ["node-a", "node-b"]),
        (b"# two Macs\r\nme@studio-1 slots=2 max_slots=4\r\n\r\nstudio-2 # one\r\n",
         ["me@studio-1", "me@studio-1", "studio-2"]),
        (b"a\nb\na\n", ["a", "a", "b"]),
        (b"10.0.0.1 slots = 2\nb max-slots=2", ["10.0.0.1", "10.0.0.1", "b"]),
        (b"a:2\nb\n", ["a", "a", "b"]),
        (b"\xef\xbb\xbfa slots=1\n", ["a"]),
        (b'\xef\xbb\xbf [{"ssh": "a"}]', ["a"]),
    ],
)  # fmt: skip
def test_the_forms_of_open_mpi_and_of_editors_are_read(text: bytes, names: list[str]) -> None:
    assert _names(text) == names


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"a slots=x\n", "line 1 of hosts has 'x', which is not slots=N"),
        (b"a\nb slots=0\n", "line 2 of hosts has 0 slots"),
        (b"a slots=99999999999999999999\n", "slots: between 1 and"),
        (b"a slots=1000\nb slots=1000\n", "hosts names more than 1024 ranks"),
        (b"^a\n", r"line 1 of hosts is not a host: '\^a'"),
        (b"-oProxyCommand=x\n", "line 1 of hosts is not a host"),
        (b"a b c\n", "line 1 of hosts has 'b c', which is not slots=N"),
        (b"caf\xe9\n", "not UTF-8"),
        (b"# nothing\n", "hosts names no host"),
        (b"<html>404</html>\n", "line 1 of hosts"),
        (b'{"hosts": ["a"]}', "not an MLX hostfile"),
    ],
)
def test_lines_that_are_no_hosts_are_refused_by_number(text: bytes, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_hostfile(text, "hosts")


def test_jaccl_files_that_leave_two_ranks_unconnected_are_refused() -> None:
    # mlx#4283: a hostfile in the wrong order, which mlx.launch takes and crashes with.
    bad_order = _jaccl(
        [None, None, "rdma_en2", "rdma_en3"],
        [None, None, "rdma_en2", "rdma_en3"],
        ["rdma_en2", "rdma_en4", None, None],
        ["rdma_en3", "rdma_en4", None, None],
    )
    with pytest.raises(UsageError, match=r"rank 0 \(a\) has no RDMA device towards rank 1 \(b\)"):
        parse_hostfile(bad_order, "hosts")
    with pytest.raises(UsageError, match=r"rank 1 \(b\) has no RDMA device towards rank 0 \(a\)"):
        parse_hostfile(_jaccl([None, "rdma_en2"], [None, None]), "hosts")
    with pytest.raises(UsageError, match=r"rank 1 \(b\) has rdma_en2 towards itself"):
        parse_hostfile(_jaccl([None, "rdma_en2"], [None, "rdma_en2"]), "hosts")
    with pytest.raises(UsageError, match=r"rank 0 \(a\) names no RDMA devices"):
        parse_hostfile(_jaccl([], []), "hosts")


def test_a_ring_over_rdma_needs_its_neighbours_only() -> None:
    ring: list[list[Any]] = [
        [None, "rdma_en2", None, "rdma_en3"],
        ["rdma_en2", None, "rdma_en3", None],
        [None, "rdma_en2", None, "rdma_en3"],
        ["rdma_en2", None, "rdma_en3", None],
    ]
    assert len(parse_hostfile(_jaccl(*ring, backend="jaccl-ring"), "hosts").hosts) == 4
    with pytest.raises(UsageError, match="towards rank 2"):
        parse_hostfile(_jaccl(*ring), "hosts")


def test_a_file_that_is_not_there_has_a_hint_that_works_without_one(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"hosts\.json cannot be read: No such file") as caught:
        read_hostfile(tmp_path / "hosts.json")
    assert (caught.value.hint or "").startswith("k2 cluster init ")
