"""The commands that the doctor runs on a node, and their raw output.

Nothing is interpreted here. A command is an argument list, is never needed by another one, and has
a time limit; what could not be run is recorded as such, so that a recording of a broken machine
shows how it is broken.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Literal

import msgspec

from k2cli.errors import ClusterError
from k2cli.nodes.node import Node

System = Literal["Darwin", "Linux"]

# sshd lets ten sessions share a connection (MaxSessions), and an unshared one is a login each.
_AT_ONCE = 4
NOT_RUN = 127
"""Status of a command that is not there, as a shell gives it."""


@dataclass(frozen=True, slots=True)
class Probe:
    """A command whose output tells something about a machine. ``quick`` ones run before launch."""

    name: str
    system: System
    arguments: tuple[str, ...]
    timeout_seconds: float = 20.0
    quick: bool = True


class ProbeOutput(msgspec.Struct, frozen=True):
    """What a command printed, with its exit status, and when (this machine's clock) it ran."""

    status: int
    stdout: str
    stderr: str = ""
    started: float = 0.0
    ended: float = 0.0


@dataclass(frozen=True, slots=True)
class RawProbes:
    """Everything that was asked of one node. ``failure`` if it answered nothing at all."""

    node: str
    system: System | None
    outputs: Mapping[str, ProbeOutput] = field(default_factory=dict)
    failure: str | None = None
    hint: str | None = None

    def text(self, name: str) -> str | None:
        """What a probe printed, or None if it was not run or failed."""
        output = self.outputs.get(name)
        return output.stdout if output is not None and output.status == 0 else None


def _probe(system: System, command: str, name: str | None = None, **options: float | bool) -> Probe:
    arguments = tuple(command.split())
    return Probe(name or arguments[0], system, arguments, **options)  # type: ignore[arg-type]


_FIREWALL = "/usr/libexec/ApplicationFirewall/socketfilterfw"

PROBES: tuple[Probe, ...] = (
    _probe("Darwin", "hostname"),
    _probe("Darwin", "sw_vers"),
    _probe(
        "Darwin",
        "system_profiler -json SPHardwareDataType SPThunderboltDataType SPDisplaysDataType",
        timeout_seconds=60.0,
    ),
    _probe(
        "Darwin",
        "sysctl hw.memsize hw.model machdep.cpu.brand_string iogpu.wired_limit_mb vm.swapusage",
    ),
    _probe("Darwin", "networksetup -listallhardwareports"),
    _probe("Darwin", "ifconfig -a"),
    _probe("Darwin", "ibv_devices"),
    _probe("Darwin", "ibv_devinfo"),
    _probe("Darwin", "rdma_ctl status"),
    _probe("Darwin", "vm_stat"),
    _probe("Darwin", "pmset -g", "pmset"),
    _probe("Darwin", "pmset -g ps", "pmset-power"),
    _probe("Darwin", f"{_FIREWALL} --getglobalstate", "firewall", quick=False),
    _probe("Darwin", f"{_FIREWALL} --getblockall", "firewall-block-all", quick=False),
    _probe("Darwin", "date -u +%s", "date"),
    _probe("Linux", "hostname"),
    _probe("Linux", "cat /etc/os-release", "os-release"),
    _probe("Linux", "uname -srm", "uname"),
    _probe("Linux", "cat /proc/meminfo", "meminfo"),
    _probe("Linux", "cat /sys/fs/cgroup/memory.max", "cgroup"),
    _probe("Linux", "cat /sys/fs/cgroup/memory/memory.limit_in_bytes", "cgroup-v1"),
    _probe("Linux", "grep -m1 -E ^(model.name|Hardware|CPU.part) /proc/cpuinfo", "cpuinfo"),
    _probe("Linux", "ip -json -details address", "ip"),
    _probe("Linux", "ls /sys/class/infiniband", "infiniband"),
    _probe(
        "Linux",
        "nvidia-smi --query-gpu=name,memory.total,memory.free --format=csv,noheader,nounits",
        "nvidia-smi",
    ),
    _probe("Linux", "date -u +%s.%N", "date"),
)


def probes_for(system: System, *, quick: bool = False) -> list[Probe]:
    """The probes that a system has."""
    return [p for p in PROBES if p.system == system and (p.quick or not quick)]


def collect(node: Node, *, quick: bool = False, model_folder: str | None = None) -> RawProbes:
    """Run every probe on a node, a few at a time.

    Args:
        node: where.
        quick: only what is needed before a launch.
        model_folder: the folder there whose volume the model is on; by default k2's own.

    Returns:
        What they printed; a node that cannot be reached gives ``failure``, not an error.
    """
    try:
        system = _system(node)
    except ClusterError as error:
        return RawProbes(node.name, None, failure=error.message, hint=error.hint)
    if system is None:
        return RawProbes(node.name, None, failure=f"node {node.name} is neither macOS nor Linux")
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        software = pool.submit(ask_software, node, model_folder)
        outputs = dict(_run_all(node, probes_for(system, quick=quick), pool))
        outputs["k2"] = software.result()
    return RawProbes(node.name, system, outputs)


def _system(node: Node) -> System | None:
    name = node.run(["uname", "-s"]).stdout.decode(errors="replace").strip()
    return "Darwin" if name == "Darwin" else "Linux" if name == "Linux" else None


def _run_all(
    node: Node, probes: Iterable[Probe], pool: ThreadPoolExecutor
) -> list[tuple[str, ProbeOutput]]:
    futures = [(probe.name, pool.submit(_run, node, probe)) for probe in probes]
    return [(name, future.result()) for name, future in futures]


def _run(node: Node, probe: Probe) -> ProbeOutput:
    started = time.time()
    try:
        done = node.run(probe.arguments, timeout_seconds=probe.timeout_seconds)
    except ClusterError as error:
        return ProbeOutput(NOT_RUN, "", error.message, started, time.time())
    return ProbeOutput(
        done.status,
        done.stdout.decode(errors="replace"),
        done.stderr.decode(errors="replace"),
        started,
        time.time(),
    )


def ask_software(node: Node, model_folder: str | None = None) -> ProbeOutput:
    """What k2 there says of itself, as JSON of ``facts.Software``."""
    started = time.time()
    arguments = [model_folder] if model_folder else []
    try:
        answer: msgspec.Raw = node.ask(msgspec.Raw, "software", *arguments)
    except ClusterError as error:
        return ProbeOutput(1, "", error.message, started, time.time())
    return ProbeOutput(0, bytes(answer).decode(), "", started, time.time())
