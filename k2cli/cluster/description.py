"""The description of a cluster: its machines and the links between them, in a file per cluster.

``k2 cluster init`` writes it by asking the machines; planning, launching and the doctor read it. It
holds only lasting facts: the present condition of the machines is asked each time.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

import msgspec

from k2cli.choices import Certainty, Device
from k2cli.cluster.facts.machine import InterfaceKind
from k2cli.cluster.hostfile import Hostfile
from k2cli.errors import ClusterError, UsageError
from k2cli.files import decode_json, encode_json, read_regular, unwritable, write_atomically
from k2cli.nodes.node import LOCALHOST, is_this_machine
from k2cli.planning.hardware.chips import chip_of_device
from k2cli.planning.hardware.gpus import Gpu
from k2cli.planning.hardware.machine import NodeMemory
from k2cli.settings import config_directory
from k2cli.units import GIB, MIB

SCHEMA_VERSION = 1
LinkKind = Literal["thunderbolt", "ethernet", "wifi", "other"]
_LIMIT_BYTES = 4 * MIB
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


class ClusterNode(msgspec.Struct, frozen=True):
    """One machine. ``name`` is its name for ssh; ``localhost`` is the machine of the description.

    ``memory_bytes`` and ``limit_bytes`` are 0 if it was never asked (an imported hostfile).
    ``interfaces`` maps each interface that was up to its addresses. ``python`` is the interpreter
    that runs k2 there, None if k2 was not installed. ``gpus`` are NVIDIA's, without present use.
    """

    name: str
    hostname: str = ""
    os: str = ""
    chip: str = ""
    memory_bytes: int = 0
    limit_bytes: int = 0
    limit_mark: Certainty = "assumed"
    device: Device = msgspec.field(default="cpu", name="backend")
    bandwidth_bytes_per_second: int | None = None
    interfaces: dict[str, tuple[str, ...]] = {}
    interface_kinds: dict[str, InterfaceKind] = {}
    rdma_devices: tuple[str, ...] = ()
    python: str | None = None
    limit_source: str = ""
    gpu_cores: int | None = None
    gpus: tuple[Gpu, ...] | msgspec.UnsetType = msgspec.UNSET


class Link(msgspec.Struct, frozen=True):
    """A connection of two nodes: a cable, or a network that both are on.

    An address is None if the interface has none that the other end can use: RDMA over Thunderbolt
    needs none.
    """

    first: str
    second: str
    kind: LinkKind
    first_interface: str
    first_address: str | None
    second_interface: str
    second_address: str | None
    rdma: bool = False
    first_rdma_device: str | None = None
    second_rdma_device: str | None = None

    def turned(self) -> Link:
        """Return the same link, seen from the other end."""
        return Link(
            self.second,
            self.first,
            self.kind,
            self.second_interface,
            self.second_address,
            self.first_interface,
            self.first_address,
            self.rdma,
            self.second_rdma_device,
            self.first_rdma_device,
        )


class Cluster(msgspec.Struct, frozen=True):
    """Machines and their links. ``hostfile`` is MLX's, if the cluster was imported from one."""

    name: str
    nodes: tuple[ClusterNode, ...]
    links: tuple[Link, ...] = ()
    schema_version: int = SCHEMA_VERSION
    hostfile: Hostfile | None = None

    def node(self, name: str) -> ClusterNode | None:
        """Return the node of that name, if there is one."""
        wanted = LOCALHOST if is_this_machine(name) else name
        return next((node for node in self.nodes if node.name == wanted), None)

    @property
    def rank_nodes(self) -> tuple[ClusterNode, ...]:
        """The node of each rank: one each, or as often as an imported hostfile lists them."""
        hosts = self.hostfile.hosts if self.hostfile is not None else ()
        listed = [node for host in hosts if (node := self.node(host.ssh)) is not None]
        complete = {node.name for node in listed} == {node.name for node in self.nodes}
        return tuple(listed) if complete and len(listed) == len(hosts) else self.nodes


# --- files --------------------------------------------------------------------------------------


def clusters_directory() -> Path:
    """Return the folder of the descriptions: one JSON file per cluster."""
    return config_directory() / "clusters"


def cluster_path(name: str) -> Path:
    """Return the path of a cluster's description.

    Raises:
        UsageError: if it cannot be the name of a cluster.
    """
    if not _NAME.fullmatch(name):
        raise UsageError(
            f"'{name}' cannot be the name of a cluster",
            "letters, digits, '.', '_' and '-', for example --name studios",
        )
    return clusters_directory() / f"{name}.json"


def list_clusters() -> list[str]:
    """List the names of all saved clusters, sorted."""
    return sorted(path.stem for path in clusters_directory().glob("*.json"))


def load_cluster(name: str | None = None) -> Cluster:
    """Read a cluster, by default the only one.

    Raises:
        UsageError: if there is none of that name, or if no name is given and there is not exactly
            one cluster.
        ClusterError: if its file is damaged.
    """
    name = name if name is not None else _only_cluster()
    path = cluster_path(name)
    try:
        cluster = decode_json(read_regular(path, _LIMIT_BYTES, follow_links=True), type=Cluster)
    except FileNotFoundError:
        raise UsageError(f"there is no cluster '{name}'", _known_clusters()) from None
    except OSError as error:
        raise ClusterError(f"{path} cannot be read: {error.strerror}") from error
    except msgspec.MsgspecError as error:
        raise ClusterError(
            f"{path} is not a description of a cluster: {error}",
            f"describe it again: k2 cluster init HOST HOST --name {name}",
        ) from error
    if cluster.schema_version > SCHEMA_VERSION:
        raise ClusterError(f"{path} was written by a newer k2", "update k2 on this machine")
    return cluster


def _only_cluster() -> str:
    names = list_clusters()
    if len(names) == 1:
        return names[0]
    problem = "there are several clusters" if names else "there is no cluster yet"
    raise UsageError(f"{problem}: name the one to use", _known_clusters())


def _known_clusters() -> str:
    names = list_clusters()
    if names:
        return f"known clusters: {', '.join(names)}"
    return "describe your machines first: k2 cluster init HOST HOST --name NAME"


def save_cluster(cluster: Cluster) -> Path:
    """Write a cluster's file atomically.

    Raises:
        ClusterError: if it cannot be written.
    """
    path = cluster_path(cluster.name)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, encode_json(cluster))
    except OSError as error:
        raise unwritable(error, path, ClusterError) from error
    return path


def remove_cluster(name: str) -> None:
    """Remove a cluster's file; nothing is changed on its machines.

    Raises:
        UsageError: if there is none of that name.
    """
    try:
        cluster_path(name).unlink()
    except FileNotFoundError:
        raise UsageError(f"there is no cluster '{name}'", _known_clusters()) from None


# --- memory for planning ------------------------------------------------------------------------


def node_memory(cluster: Cluster) -> list[NodeMemory]:
    """Convert the machine of each rank to the planner's type.

    Raises:
        ClusterError: if the memory of a machine is not known.
    """
    return [_memory_of(node, cluster.name) for node in cluster.rank_nodes]


def _memory_of(node: ClusterNode, cluster: str) -> NodeMemory:
    if node.memory_bytes <= 0:
        raise ClusterError(
            f"the memory size of {node.name} is not known",
            f"k2 cluster refresh {cluster}",
        )
    chip = chip_of_device(node.chip)
    memory_gib = node.memory_bytes // GIB
    cores = node.gpu_cores or (chip.usual_gpu_cores(memory_gib) if chip else 0)
    return NodeMemory(
        node.name,
        node.memory_bytes,
        node.limit_bytes,
        node.limit_mark,
        node.device,
        node.limit_source or f"as recorded for the cluster {cluster}",
        chip=chip.identifier if chip else "",
        bandwidth_bytes_per_second=node.bandwidth_bytes_per_second,
        gpu_flops_per_second=chip.flops_per_second(cores) if chip else None,
        gpus=(node.gpus or ()) if node.device == "cuda" else (),
    )
