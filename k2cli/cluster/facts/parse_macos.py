"""Parsers of the probes of a Mac: pure functions from raw output to facts.

The formats are those of macOS 26 and 27 on Apple silicon; tests/doctor/data names the public
records that they were taken from.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

from k2cli.agent.software import Software
from k2cli.choices import Certainty
from k2cli.cluster.facts.machine import (
    Condition,
    Firewall,
    InterfaceKind,
    MachineFacts,
    ThunderboltPort,
)
from k2cli.cluster.facts.probes import RawProbes
from k2cli.errors import ClusterError
from k2cli.files import decode_json
from k2cli.planning.hardware.chips import apple_gpu_limit, chip_of_device
from k2cli.units import GIB, MIB, whole_number


def machine(raw: RawProbes, software: Software | None) -> MachineFacts:
    """Read the facts of a Mac.

    Raises:
        ClusterError: if its memory is not known.
    """
    kernel = sysctl(raw.printed("sysctl"))
    profile = _profile(raw)
    hardware = _first(profile, "SPHardwareDataType")
    memory = whole_number(kernel.get("hw.memsize", ""))
    if memory is None:
        raise ClusterError(f"node {raw.node} does not report its memory size")
    chip = kernel.get("machdep.cpu.brand_string") or str(hardware.get("chip_type", "Apple silicon"))
    cores = _gpu_cores(profile)
    limit, mark, source = _limit(memory, kernel, software)
    ports = hardware_ports(raw.text("networksetup") or "")
    interfaces = ifconfig(raw.text("ifconfig") or "")
    used = {each.name: each for each in interfaces if each.usable}
    return MachineFacts(
        hostname=(raw.text("hostname") or "").strip(),
        os_name="macos",
        os_version=sw_vers(raw.text("sw_vers") or "").get("ProductVersion", ""),
        model=kernel.get("hw.model") or _text(hardware, "machine_model"),
        chip=chip,
        memory_bytes=memory,
        limit_bytes=limit,
        limit_mark=mark,
        limit_source=source,
        backend="metal",
        bandwidth_bytes_per_second=_bandwidth(chip, cores, memory),
        interfaces={name: each.addresses for name, each in used.items()},
        interface_kinds={name: _kind(name, ports.get(name)) for name in used},
        thunderbolt_ports=thunderbolt_ports(profile, ports),
        rdma_devices=ibv_devices(raw.text("ibv_devices") or ""),
        gpu_cores=cores,
        prefix_lengths=_prefix_lengths(used.values()),
        bridges={each.name: each.members for each in interfaces if each.members},
        rdma_states=ibv_devinfo(raw.text("ibv_devinfo") or ""),
    )


def condition(raw: RawProbes) -> Condition:
    """Read the present condition of a Mac, without its clock."""
    kernel = sysctl(raw.printed("sysctl"))
    minutes, prevented = sleep_setting(raw.text("pmset") or "")
    power = raw.text("pmset-power")
    return Condition(
        available_bytes=available_memory(raw.text("vm_stat") or ""),
        wired_limit_mib=whole_number(kernel.get("iogpu.wired_limit_mb", "")),
        sleep_minutes=minutes,
        sleep_prevented_by=prevented,
        firewall=firewall(raw.text("firewall"), raw.text("firewall-block-all")),
        rdma_enabled=rdma_enabled(raw),
        on_battery=None if power is None else "Battery Power" in power.partition("\n")[0],
    )


# --- one command each ---------------------------------------------------------------------------


def sysctl(text: str) -> dict[str, str]:
    """Parse ``name: value`` lines.

    ``sysctl`` prints what it knows, and fails if the system lacks one of the names.
    """
    pairs = (line.partition(":") for line in text.splitlines() if ":" in line)
    return {name.strip(): value.strip() for name, _, value in pairs}


def sw_vers(text: str) -> dict[str, str]:
    """Parse lines such as ``ProductVersion: 26.2``."""
    return sysctl(text)


def hardware_ports(text: str) -> dict[str, str]:
    """Map interfaces to their hardware ports, from ``networksetup -listallhardwareports``."""
    pairs = re.findall(r"^Hardware Port: (.+)\n\s*Device: (\S+)", text, re.MULTILINE)
    return {device: port.strip() for port, device in pairs}


def ibv_devices(text: str) -> tuple[str, ...]:
    """List the RDMA devices: one per line below a heading of two lines."""
    return tuple(line.split()[0] for line in text.splitlines() if line.strip().startswith("rdma_"))


def ibv_devinfo(text: str) -> dict[str, str]:
    """Map RDMA devices to the states of their ports, such as ``PORT_ACTIVE``."""
    found = re.findall(r"hca_id:\s*(\S+).*?\bstate:\s*(\S+)", text, re.DOTALL)
    return dict(found)


def available_memory(text: str) -> int | None:
    """Sum the memory that a program can get at once: free, speculative and inactive pages."""
    page = re.search(r"page size of (\d{1,9}) bytes", text)
    pages = {
        name: int(count)
        for name, count in re.findall(
            r"^Pages (free|speculative|inactive):\s+(\d{1,18})\.", text, re.MULTILINE
        )
    }
    if page is None or "free" not in pages or "inactive" not in pages:
        return None
    return int(page.group(1)) * sum(pages.values())


def sleep_setting(text: str) -> tuple[int | None, str | None]:
    """Read the minutes until the Mac sleeps (0: never), and the programs that keep it awake."""
    if re.search(r"^\s*SleepDisabled\s+1\b", text, re.MULTILINE):
        return 0, None
    setting = r"^\s*sleep\s+(\d{1,9})(?:\s+\(sleep prevented by (.*?)\))?"
    match = re.search(setting, text, re.MULTILINE)
    return (int(match.group(1)), match.group(2)) if match else (None, None)


def firewall(state: str | None, block_all: str | None) -> Firewall | None:
    """Read ``socketfilterfw --getglobalstate``: ``State = `` 0 (off), 1 (on) or 2 (block all)."""
    match = re.search(r"State = (\d)", state or "")
    if match is None:
        return None
    if match.group(1) == "0":
        return "off"
    blocked = re.search(r"block all.*\b(enabled|on)\b", (block_all or "").lower())
    return "block-all" if match.group(1) == "2" or blocked else "on"


def rdma_enabled(raw: RawProbes) -> bool | None:
    """Read ``rdma_ctl status``, ``enabled`` or ``disabled``; None before macOS 26.2."""
    status = (raw.text("rdma_ctl") or "").strip().lower()
    if status.startswith("enabled") or status.endswith(" enabled"):
        return True
    return False if "disabled" in status else None


# --- interfaces ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Interface:
    """An interface in the output of ``ifconfig``. ``active`` is None if it has no status line."""

    name: str
    up: bool
    active: bool | None
    networks: tuple[str, ...]
    members: tuple[str, ...]

    @property
    def addresses(self) -> tuple[str, ...]:
        """Addresses without prefix lengths."""
        return tuple(network.partition("/")[0] for network in self.networks)

    @property
    def usable(self) -> bool:
        """True if it is up, and connected or addressed: a connected port may have no address."""
        return self.up and (bool(self.active) or bool(self.networks))


def ifconfig(text: str) -> list[Interface]:
    """Parse the interfaces of ``ifconfig -a``."""
    blocks = re.split(r"^(?=[a-z]+\d+: flags=)", text, flags=re.MULTILINE)
    return [_interface(block) for block in blocks if re.match(r"[a-z]+\d+: flags=", block)]


def _interface(block: str) -> Interface:
    flags = re.match(r"(\w+): flags=\w+<(.*?)>", block)
    status = re.search(r"^\s*status: (\w+)", block, re.MULTILINE)
    return Interface(
        name=block.partition(":")[0],
        up=flags is not None and "UP" in flags.group(2).split(","),
        active=None if status is None else status.group(1) == "active",
        networks=tuple(_networks(block)),
        members=tuple(re.findall(r"^\s*member: (\S+)", block, re.MULTILINE)),
    )


def _networks(block: str) -> Iterator[str]:
    """IPv4 first; a link-local IPv6 address means nothing without its interface."""
    four = r"^\s*inet ([^\s/]+)(?: --> \S+)? netmask (0x[0-9a-f]{8})"
    for address, mask in re.findall(four, block, re.MULTILINE):
        try:
            prefix = ipaddress.ip_network(
                f"0.0.0.0/{ipaddress.ip_address(int(mask, 16))}"
            ).prefixlen
        except ValueError:  # ones after zeros
            continue
        yield f"{address}/{prefix}"
    for address, prefix in re.findall(
        r"^\s*inet6 ([^\s/]+) prefixlen (\d{1,3})", block, re.MULTILINE
    ):
        if "%" not in address and not address.startswith("fe80"):
            yield f"{address}/{prefix}"


def _prefix_lengths(interfaces: Iterable[Interface]) -> dict[str, int]:
    pairs = (network.split("/") for each in interfaces for network in each.networks)
    return {address: int(length) for address, length in pairs}


def _kind(name: str, port: str | None) -> InterfaceKind:
    if name.startswith("lo"):
        return "loopback"
    if port is None:
        return "other"
    if re.fullmatch(r"Thunderbolt (\d+|Bridge)", port):
        return "thunderbolt"  # and "Thunderbolt Ethernet Slot 1" is a network adapter
    if port in ("Wi-Fi", "AirPort"):
        return "wifi"
    known = re.match(r"Ethernet|.*\bLAN\b|.*Ethernet", port)
    return "ethernet" if known else "other"


# --- system_profiler ----------------------------------------------------------------------------


def _profile(raw: RawProbes) -> Mapping[str, Any]:
    try:
        found = decode_json(raw.text("system_profiler") or "{}", type=object)
    except msgspec.DecodeError as error:
        raise ClusterError(f"node {raw.node}: system_profiler printed no JSON: {error}") from None
    return found if isinstance(found, dict) else {}


def _objects(value: object) -> list[Mapping[str, Any]]:
    """Return the objects of a list; none if it is no list."""
    members = value if isinstance(value, list) else []
    return [member for member in members if isinstance(member, dict)]


def _text(fields: Mapping[str, Any], name: str) -> str | None:
    value = fields.get(name)
    return value if isinstance(value, str) else None


def _first(profile: Mapping[str, Any], kind: str) -> Mapping[str, Any]:
    return next(iter(_objects(profile.get(kind))), {})


def thunderbolt_ports(
    profile: Mapping[str, Any], ports: Mapping[str, str]
) -> tuple[ThunderboltPort, ...]:
    """List the Mac's Thunderbolt ports by receptacle, each with the Mac connected to it.

    Args:
        profile: the output of ``system_profiler -json SPThunderboltDataType``.
        ports: interface -> hardware port, from ``hardware_ports``.
    """
    interfaces = {port: name for name, port in ports.items()}
    found = []
    for bus in _objects(profile.get("SPThunderboltDataType")):
        tag = bus.get("receptacle_1_tag")
        if not isinstance(tag, dict) or "receptacle_id_key" not in tag:
            continue
        receptacle = str(tag["receptacle_id_key"])
        peer, through = _peer(_objects(bus.get("_items")))
        found.append(
            ThunderboltPort(
                receptacle=receptacle,
                interface=interfaces.get(f"Thunderbolt {receptacle}"),
                domain=_text(bus, "domain_uuid_key"),
                peer_domain=_text(peer, "domain_uuid_key"),
                peer_name=_text(peer, "device_name_key") or _text(peer, "_name"),
                speed=str(tag.get("current_speed_key", "")),
                through_device=through,
            )
        )
    return tuple(sorted(found, key=lambda port: port.receptacle))


def _peer(
    items: list[Mapping[str, Any]], through: str | None = None
) -> tuple[Mapping[str, Any], str | None]:
    """Find the Mac connected to a port, and the device between them if there is one."""
    for item in items:
        is_mac = "domain_uuid_key" in item or str(item.get("device_name_key", "")).startswith("Mac")
        if is_mac:
            return item, through
        nested, device = _peer(_objects(item.get("_items")), str(item.get("_name", "a device")))
        if nested:
            return nested, device
    return {}, None


def _gpu_cores(profile: Mapping[str, Any]) -> int | None:
    for display in _objects(profile.get("SPDisplaysDataType")):
        cores = whole_number(str(display.get("sppci_cores", "")))
        if cores is not None:
            return cores
    return None


def _bandwidth(chip_name: str, cores: int | None, memory: int) -> int | None:
    """Return the chip's peak memory bandwidth in bytes per second, from the catalog."""
    chip = chip_of_device(chip_name)
    if chip is None:
        return None
    known = cores if cores in chip.gpu_cores else chip.usual_gpu_cores(memory // GIB)
    return chip.bandwidth_bytes_per_second(known or chip.gpu_cores[-1], memory // GIB)


def _limit(
    memory: int, kernel: Mapping[str, str], software: Software | None
) -> tuple[int, Certainty, str]:
    """Return the memory that MLX may use: Metal's figure, the sysctl's, or that of equal Macs."""
    if software is not None and software.limit_bytes is not None:
        return software.limit_bytes, software.limit_mark, software.limit_source
    set_to = whole_number(kernel.get("iogpu.wired_limit_mb", "0"))
    if set_to:
        return set_to * MIB, "exact", "iogpu.wired_limit_mb"
    limit, source = apple_gpu_limit(memory // GIB)
    return limit, "assumed", source
