"""Descriptions of clusters: files, import of MLX's hostfiles, and the text view."""

from __future__ import annotations

import json
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
from k2cli.cluster.discovery import NodeActivity, cluster_from_hostfile
from k2cli.cluster.hostfile import format_hostfile, parse_hostfile, read_hostfile
from k2cli.cluster.links import (
    to_hostfile,
)
from k2cli.cluster.node_lookup import cluster_nodes
from k2cli.errors import ClusterError, UsageError
from k2cli.ui.cluster_view import print_cluster
from k2cli.units import GIB
from tests.cluster.test_links import PAIR, make_cluster, read_with_mlx


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
    assert read_with_mlx(back).to_json() == read_with_mlx(given).to_json()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not an MLX hostfile"),
        ('{"hosts": [{"ips": []}]}', "missing required field `ssh`"),
        ('{"hosts": []}', "names no host"),
        ('[{"ssh": "-oProxyCommand=x"}]', "cannot be the name of a host"),
        ('[{"ssh": "a", "rdma": [null]}, {"ssh": "b"}]', "1 RDMA entries for 2 hosts"),
        ("\xff", "is not a hostfile: it is not UTF-8"),
    ],
)
def test_what_is_no_hostfile_is_refused(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_hostfile(text.encode("latin-1"), "hosts.json")


def test_clusters_are_saved_and_the_only_one_needs_no_name() -> None:
    with pytest.raises(UsageError, match="there is no cluster yet"):
        load_cluster()
    cluster = make_cluster(PAIR)
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
    path = save_cluster(make_cluster(PAIR))
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
    cluster = make_cluster(PAIR)
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
