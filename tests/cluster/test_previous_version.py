"""A cluster description that the previous version of k2 saved."""

from __future__ import annotations

from pathlib import Path

from k2cli.cluster.description import cluster_path, load_cluster, node_memory, save_cluster

SAVED = Path(__file__).resolve().parents[1] / "data" / "previous" / "cluster.json"


def test_a_description_of_the_previous_version_loads_and_is_written_back_unchanged() -> None:
    path = cluster_path("studios")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(SAVED.read_bytes())
    cluster = load_cluster("studios")
    assert [node.device for node in cluster.nodes] == ["metal", "metal"]
    assert [link.kind for link in cluster.links] == ["thunderbolt", "ethernet"]
    assert [node.limit_bytes for node in node_memory(cluster)] == [429_496_729_600, 412_316_860_416]
    save_cluster(cluster)
    assert path.read_bytes() == SAVED.read_bytes()
