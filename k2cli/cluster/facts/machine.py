"""Facts about a machine: its hardware and system, its software, and its present condition.

Parsers make these values from the raw output of probes; checks and discovery read them. A fact that
no probe has told is None.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from k2cli.agent.software import Software
from k2cli.choices import Certainty, Device
from k2cli.planning.hardware.gpus import Gpu

InterfaceKind = Literal["thunderbolt", "ethernet", "wifi", "loopback", "other"]
OsName = Literal["macos", "linux"]
Firewall = Literal["on", "off", "block-all"]


@dataclass(frozen=True, slots=True)
class ThunderboltPort:
    """One Thunderbolt port of a Mac.

    ``domain`` is the port's own domain UUID, ``peer_domain`` that of the Mac at the cable's other
    end: two ports are connected if each has the other's. ``interface`` is the network interface of
    the port (``en5``), ``speed`` the text of macOS (``80 Gb/s``; ``Up to 120 Gb/s`` while idle).
    """

    receptacle: str
    interface: str | None
    domain: str | None
    peer_domain: str | None
    peer_name: str | None
    speed: str
    through_device: str | None = None


@dataclass(frozen=True, slots=True)
class MachineFacts:
    """Hardware, system and networks of a machine. Sizes in bytes.

    ``limit_bytes`` is the memory that MLX may use there, ``limit_mark`` and ``limit_source`` tell
    its certainty and source; ``backend`` is the device. ``interfaces`` maps each interface that is
    up to its addresses (IPv4 first, no link-local IPv6); ``interface_kinds`` has the same keys.
    ``bridges`` has the members of each bridge, ``rdma_states`` the port state of each RDMA device
    (``PORT_ACTIVE``). ``prefix_lengths`` maps an address to the bits of its network, if known.
    ``gpus`` are NVIDIA's; MLX uses them if ``backend`` is ``cuda``.
    """

    hostname: str
    os_name: OsName
    os_version: str
    model: str | None
    chip: str
    memory_bytes: int
    limit_bytes: int
    limit_mark: Certainty
    limit_source: str
    backend: Device
    bandwidth_bytes_per_second: int | None
    interfaces: Mapping[str, tuple[str, ...]]
    interface_kinds: Mapping[str, InterfaceKind]
    thunderbolt_ports: tuple[ThunderboltPort, ...] = ()
    rdma_devices: tuple[str, ...] = ()
    gpu_cores: int | None = None
    bridges: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    rdma_states: Mapping[str, str] = field(default_factory=dict)
    prefix_lengths: Mapping[str, int] = field(default_factory=dict)
    gpus: tuple[Gpu, ...] = ()

    @property
    def thunderbolt_peers(self) -> dict[str, str]:
        """Interface -> domain UUID of the Mac at the other end of its cable."""
        return {
            port.interface: port.peer_domain
            for port in self.thunderbolt_ports
            if port.interface and port.peer_domain
        }

    @property
    def thunderbolt_domains(self) -> dict[str, str]:
        """Interface -> the port's own domain UUID."""
        return {
            port.interface: port.domain
            for port in self.thunderbolt_ports
            if port.interface and port.domain
        }


def thunderbolt_links(
    machines: Mapping[str, MachineFacts],
) -> list[tuple[str, str, str, str]]:
    """Cables between the given machines.

    Returns:
        ``(first node, its interface, second node, its interface)``, each cable once, in the order
        of the nodes given.
    """
    owners = {
        domain: (name, interface)
        for name, facts in machines.items()
        for interface, domain in facts.thunderbolt_domains.items()
    }
    order = list(machines)
    found: set[tuple[str, str, str, str]] = set()
    for name, facts in machines.items():
        for interface, peer in facts.thunderbolt_peers.items():
            if peer not in owners or owners[peer][0] == name:
                continue
            ends = sorted([(name, interface), owners[peer]], key=lambda end: order.index(end[0]))
            found.add((*ends[0], *ends[1]))
    return sorted(found, key=lambda link: (order.index(link[0]), order.index(link[2]), link[1]))


@dataclass(frozen=True, slots=True)
class Condition:
    """Present condition of a machine; None for what its commands have not told.

    ``clock_offset_seconds`` is that machine's clock minus this one's, with an error of at most
    ``clock_error_seconds``. ``sleep_minutes`` is 0 if it never sleeps.
    """

    available_bytes: int | None = None
    wired_limit_mib: int | None = None
    sleep_minutes: int | None = None
    sleep_prevented_by: str | None = None
    firewall: Firewall | None = None
    rdma_enabled: bool | None = None
    clock_offset_seconds: float | None = None
    clock_error_seconds: float | None = None
    on_battery: bool | None = None


@dataclass(frozen=True, slots=True)
class Examination:
    """All facts about one node.

    ``failure`` is the reason if there are none, and ``failure_hint`` the command that fixes it.
    """

    node: str
    machine: MachineFacts | None = None
    software: Software | None = None
    condition: Condition = Condition()
    failure: str | None = None
    failure_hint: str | None = None
    software_failure: str | None = None
    machine_failure: str | None = None
