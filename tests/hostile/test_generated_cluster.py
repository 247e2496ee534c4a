"""Generated answers of other machines, and files about them: facts, hostfiles, descriptions."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from random import Random
from typing import Any

import msgspec
import pytest

from k2cli.agent.activity import Activity
from k2cli.agent.facts import NodeFacts
from k2cli.agent.link import Figures
from k2cli.agent.locks import Lock, LockAnswer
from k2cli.agent.model import CheckpointHeads, ModelCopy
from k2cli.agent.reach import Listening
from k2cli.agent.software import Software
from k2cli.cluster.description import clusters_directory, load_cluster, node_memory, save_cluster
from k2cli.cluster.discovery import cluster_from_hostfile, describe_node
from k2cli.cluster.facts.probes import ProbeOutput, RawProbes
from k2cli.cluster.facts.reading import examine
from k2cli.cluster.hostfile import format_hostfile, parse_hostfile, rank_environment, read_hostfile
from k2cli.cluster.links import detect_links
from k2cli.doctor.recording import replay
from k2cli.doctor.redaction import Redactor
from k2cli.nodes.interpreter import Report
from k2cli.nodes.node import decode_answer
from k2cli.planning.hardware.machine import NodeMemory
from k2cli.transfer.headers import fetch_headers
from tests.hostile.mutation import (
    as_json,
    bounded,
    generated,
    hostile_value,
    mutated_json,
    mutated_text,
    reads_or_refuses,
)

RECORDING = Path(__file__).parent.parent / "doctor" / "data" / "healthy-pair"
HOSTFILES: list[Any] = [
    {
        "backend": "jaccl", "envs": ["MLX_METAL_FAST_SYNCH=1", "A"],
        "hosts": [
            {"ssh": "a", "ips": ["10.0.0.1"], "rdma": [None, "rdma_en5"]},
            {"ssh": "b", "ips": ["10.0.0.2"], "rdma": [["rdma_en5", "rdma_en6"], None]},
        ],
    },
    [{"ssh": "a", "ips": ["10.0.0.1", "fe80::1"]}, {"ssh": "localhost", "ips": []}],
]  # fmt: skip
NODE: dict[str, Any] = {
    "name": "a", "hostname": "a.local", "os": "macOS 26.2", "chip": "Apple M3 Ultra",
    "memory_bytes": 2**39, "limit_bytes": 2**38, "limit_mark": "exact", "backend": "metal",
    "bandwidth_bytes_per_second": 819, "interfaces": {"en5": ["10.0.0.1", "fd00::1"]},
    "interface_kinds": {"en5": "thunderbolt"}, "rdma_devices": ["rdma_en5"], "python": "/p",
    "limit_source": "s", "gpu_cores": 80,
}  # fmt: skip
CLUSTER: dict[str, Any] = {
    "name": "x", "nodes": [NODE, {**NODE, "name": "b"}], "schema_version": 1,
    "links": [{
        "first": "a", "second": "b", "kind": "thunderbolt", "first_interface": "en5",
        "first_address": "10.0.0.1", "second_interface": "en5", "second_address": None,
        "rdma": True, "first_rdma_device": "rdma_en5", "second_rdma_device": "rdma_en5",
    }],
    "hostfile": HOSTFILES[0],
}  # fmt: skip
IP: list[dict[str, Any]] = [
    {"ifname": "lo", "flags": ["LOOPBACK", "UP"], "link_type": "loopback",
     "addr_info": [{"local": "127.0.0.1", "prefixlen": 8, "scope": "host"}]},
    {"ifname": "eth0", "flags": ["UP"], "link_type": "ether", "linkinfo": {"info_kind": "veth"},
     "addr_info": [{"local": "10.0.0.5", "prefixlen": 24, "scope": "global"},
                   {"local": "fe80::1", "prefixlen": 64, "scope": "link"}]},
    {},
]  # fmt: skip
LINUX = {
    "hostname": "node\n",
    "os-release": 'NAME="Debian GNU/Linux"\nVERSION_ID="12"\n',
    "meminfo": "MemTotal:       24576000 kB\nMemFree: 1 kB\nMemAvailable:   20000000 kB\n",
    "cgroup": "8589934592\n",
    "cgroup-v1": "max\n",
    "cpuinfo": "model name\t: Some CPU @ 2GHz\n",
    "infiniband": "mlx5_0\nmlx5_1\n",
    "nvidia-gpus": "0, GPU-1, NVIDIA H200, 143771, 143000, 500, Default, Disabled\n" * 2,
    "date": "1764000000.123456789\n",
}
SOFTWARE: dict[str, Any] = {
    "k2_version": "1", "python": "/p", "python_version": "3.11", "mlx_version": "0.32.4",
    "mlx_lm_version": "0.30", "mlx_error": None, "memory_bytes": 2**35, "limit_bytes": 2**34,
    "limit_mark": "exact", "limit_source": "s", "backend": "cpu", "backends": ["ring", "jaccl"],
    "available_bytes": 2**33, "mpirun": "/usr/bin/mpirun", "mpi_version": "4.1.4", "libmpi": "/l",
    "volume": {"path": "/", "mount_point": "/", "filesystem": "ext4", "free_bytes": 1,
               "total_bytes": 2},
    "time": 1764000000.0, "processes": [{"pid": 1, "name": "x", "resident_bytes": 1}],
    "interfaces": {"eth0": ["10.0.0.5"]}, "mpi_versions": {"/usr/bin/mpirun": "4.1.4"},
    "load_average": 0.5, "cores": 2,
}  # fmt: skip
LOCK = {
    "claim": {"run_id": "r", "user": "u", "host": "h", "pid": 1, "pid_create_time": 1.0},
    "state": "held",
}
HEADS = {
    "folder": "/m/kimi", "problem": "",
    "files": [{"name": "config.json", "size": 2, "head": "e30="},
              {"name": "model.safetensors", "size": 9, "head": "AAAA"}],
}  # fmt: skip
ANSWERS: list[tuple[Any, Any]] = [
    (Software, SOFTWARE),
    (CheckpointHeads, HEADS),
    (ModelCopy, {"folder": "/m", "digest": "ab", "problem": ""}),
    (LockAnswer, {"taken": True, "holders": [LOCK], "removed": ["r"]}),
    (tuple[Lock, ...], [LOCK]),
    (Activity, {"runs": [{"run_id": "r", "processes": 1}]}),
    (NodeFacts, {}),
    (NodeMemory, {"name": "a", "memory_bytes": 1, "limit_bytes": 1, "limit_mark": "exact",
                  "backend": "metal", "limit_source": "s"}),
    (Report, {"executable": "/p", "python": [3, 11, 7], "k2": "1", "digest": "a", "packages": {}}),
    (list[int], [1, 2, 3]),
    (Listening, {"port": 80, "word": "w", "port_v6": None}),
    (Figures, {"all_reduce_seconds": 1e-5, "latency_seconds": None, "bytes_per_second": 1e9}),
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(HOSTFILES)))
@generated(200)
def test_hostfile(tmp_path: Path, number: int, draw: Random) -> None:
    path = tmp_path / "hosts.json"
    path.write_bytes(mutated_json(HOSTFILES[number], draw))
    hostfile = reads_or_refuses(lambda: read_hostfile(path), str(path))
    if hostfile is None:
        return
    with bounded():
        rank_environment(hostfile)
        assert parse_hostfile(format_hostfile(hostfile).encode(), "again") == hostfile
    cluster = reads_or_refuses(lambda: cluster_from_hostfile("x", hostfile))
    if cluster is not None:
        save_cluster(cluster)
        assert reads_or_refuses(lambda: load_cluster("x")) == cluster


@generated(250)
def test_description_of_a_cluster(draw: Random) -> None:
    path = clusters_directory() / "x.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(mutated_json(CLUSTER, draw))
    cluster = reads_or_refuses(lambda: load_cluster("x"), str(path))
    if cluster is not None:
        reads_or_refuses(lambda: node_memory(cluster))
        with bounded():
            msgspec.json.encode(cluster)
            cluster.node("b")


def printed(text: str, draw: Random) -> str:
    """Return another output, decoded as ``facts.probes`` decodes it."""
    return mutated_text(text, draw).encode(errors="replace").decode(errors="replace")


def look_at(raw: RawProbes) -> None:
    """Read the facts, and use them as ``cluster init`` does."""
    with bounded():
        found = examine(raw)
        if found.machine is None:
            assert found.machine_failure
            return
        machines = {"a": found.machine, "b": found.machine}
        msgspec.json.encode(describe_node("a", found.machine, None))
        detect_links(machines)


@generated(300)
def test_facts_of_a_linux_machine(draw: Random) -> None:
    outputs = dict(LINUX)
    for name in draw.sample(sorted(outputs), draw.choice((0, 1, 2))):
        outputs[name] = printed(outputs[name], draw)
    probes = {name: ProbeOutput(0, text) for name, text in outputs.items()}
    ip = mutated_json(IP, draw) if draw.random() < 0.7 else json.dumps(IP).encode()
    probes["ip"] = ProbeOutput(0, ip.decode(errors="replace"))
    if draw.random() < 0.5:
        software = mutated_json(SOFTWARE, draw).decode(errors="replace")
        probes["k2"] = ProbeOutput(0, software)
    if draw.random() < 0.2:
        del probes[draw.choice(sorted(probes))]
    look_at(RawProbes("a", "Linux", probes))


def macs() -> dict[str, str]:
    """Return the recorded output of each probe of a Mac."""
    return {path.stem: path.read_text() for path in (RECORDING / "node-1").iterdir()}


@generated(300)
def test_facts_of_a_mac(draw: Random) -> None:
    outputs = macs()
    for name in draw.sample(sorted(outputs), draw.choice((1, 1, 2))):
        if name in ("k2", "system_profiler"):
            changed = mutated_json(json.loads(outputs[name]), draw)
            outputs[name] = changed.decode(errors="replace")
        else:
            outputs[name] = printed(outputs[name], draw)
    probes = {name: ProbeOutput(0, text) for name, text in outputs.items()}
    look_at(RawProbes("a", "Darwin", probes))


@generated(200)
def test_redaction(draw: Random) -> None:
    """Nothing that a machine prints keeps a recording from being written."""
    outputs = {**LINUX, **macs(), "ip": json.dumps(IP)}
    name = draw.choice(sorted(outputs))
    if name in ("k2", "system_profiler", "ip"):
        text = mutated_json(json.loads(outputs[name]), draw).decode(errors="replace")
    else:
        text = printed(outputs[name], draw)
    with bounded():
        Redactor().probe(name, text).encode()


@generated(100)
def test_recording(tmp_path: Path, draw: Random) -> None:
    folder = tmp_path / "recording"
    if not folder.exists():
        shutil.copytree(RECORDING, folder)
    changed = draw.choice(sorted(path for path in folder.rglob("*") if path.is_file()))
    before = changed.read_bytes()
    if changed.suffix == ".json":
        after = mutated_json(json.loads(before), draw)
    else:
        after = mutated_text(before.decode(), draw).encode(errors="replace")
    changed.write_bytes(after)
    try:
        reads_or_refuses(lambda: replay(folder), "recording")
    finally:
        changed.write_bytes(before)


@pytest.mark.parametrize("number", range(len(ANSWERS)))
@generated(80)
def test_answer_of_an_agent(number: int, draw: Random) -> None:
    kind, document = ANSWERS[number]
    answer = mutated_json(document, draw)
    reads_or_refuses(lambda: decode_answer("studio-1", "verb", answer, kind), "studio-1")


class _Answering:
    """A node that answers with a document."""

    name = "studio-1"

    def __init__(self, document: Any) -> None:
        self._document = document

    def ask(self, kind: Any, verb: str, *arguments: str) -> Any:
        return decode_answer(self.name, verb, as_json(self._document), kind)


@generated(150)
def test_headers_from_a_node(tmp_path: Path, draw: Random) -> None:
    """A node that names files and sizes can write nothing elsewhere."""
    base = tmp_path / "base"
    base.mkdir()
    heads = copy.deepcopy(HEADS)
    files: list[dict[str, Any]] = heads["files"]  # type: ignore[assignment]
    target = draw.choice((heads, files[0], files[1]))
    name = draw.choice(sorted(target))
    value = hostile_value(draw)
    odd = ("..", ".", "", "/", "a\0b", "x" * 300, -1, 2**63, 2**62, "../../x")
    target[name] = draw.choice(odd) if draw.random() < 0.7 else value
    try:
        node: Any = _Answering(heads)
        reads_or_refuses(lambda: fetch_headers("/m/kimi", node, base), "studio-1")
        assert [path.name for path in tmp_path.iterdir()] == ["base"]
    finally:
        shutil.rmtree(base)
