"""Commands (probes) that tell facts about a node, and their raw output.

The output is not interpreted here. Each command is an argument list with a time limit, and none
depends on another one. A command that cannot be run is recorded as such, so a recording of a broken
machine shows its faults.
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
from k2cli.planning.hardware.gpus import QUERY

System = Literal["Darwin", "Linux"]

# sshd allows ten sessions per connection (MaxSessions); every other connection needs a login.
_AT_ONCE = 4
NOT_RUN = 127
"""A shell's exit status for a command that does not exist."""


@dataclass(frozen=True, slots=True)
class Probe:
    """A command whose output tells facts about a machine. ``quick`` ones run before a launch."""

    name: str
    system: System
    arguments: tuple[str, ...]
    timeout_seconds: float = 20.0
    quick: bool = True


class ProbeOutput(msgspec.Struct, frozen=True):
    """Output and exit status of a command, and its start and end by this machine's clock."""

    status: int
    stdout: str
    stderr: str = ""
    started: float = 0.0
    ended: float = 0.0


@dataclass(frozen=True, slots=True)
class RawProbes:
    """Output of all probes of one node. ``failure`` is the reason if the node did not answer."""

    node: str
    system: System | None
    outputs: Mapping[str, ProbeOutput] = field(default_factory=dict)
    failure: str | None = None
    hint: str | None = None

    def text(self, name: str) -> str | None:
        """Return the output of a probe, or None if it was not run or failed."""
        output = self.outputs.get(name)
        return output.stdout if output is not None and output.status == 0 else None

    def printed(self, name: str) -> str:
        """Return what a probe printed, also if it failed in a part of what it was asked for."""
        output = self.outputs.get(name)
        return output.stdout if output is not None else ""


def _probe(system: System, command: str, name: str | None = None, **options: float | bool) -> Probe:
    arguments = tuple(command.split())
    return Probe(name or arguments[0], system, arguments, **options)  # type: ignore[arg-type]


FIREWALL_PROGRAM = "/usr/libexec/ApplicationFirewall/socketfilterfw"

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
    _probe("Darwin", f"{FIREWALL_PROGRAM} --getglobalstate", "firewall", quick=False),
    _probe("Darwin", f"{FIREWALL_PROGRAM} --getblockall", "firewall-block-all", quick=False),
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
    Probe("nvidia-gpus", "Linux", QUERY),
    _probe("Linux", "date -u +%s.%N", "date"),
)


def probes_for(system: System, *, quick: bool = False) -> list[Probe]:
    """List the probes of a system."""
    return [p for p in PROBES if p.system == system and (p.quick or not quick)]


def collect(node: Node, *, quick: bool = False, model_folder: str | None = None) -> RawProbes:
    """Run every probe on a node, a few at a time.

    Args:
        node: the node to examine.
        quick: run only the probes that are needed before a launch.
        model_folder: the folder of the model there; by default k2's own folder of models.

    Returns:
        Their output; ``failure`` is set if the node cannot be reached.
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
    """Ask the node's agent for its ``agent.software.Software``, and keep the JSON as output."""
    started = time.time()
    arguments = [model_folder] if model_folder else []
    try:
        answer: msgspec.Raw = node.ask(msgspec.Raw, "software", *arguments)
    except ClusterError as error:
        return ProbeOutput(1, "", error.message, started, time.time())
    return ProbeOutput(0, bytes(answer).decode(), "", started, time.time())
