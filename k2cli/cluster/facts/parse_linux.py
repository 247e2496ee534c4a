"""Parsers of the probes of a Linux machine: pure functions from raw output to facts."""

from __future__ import annotations

import re
from typing import Any

import msgspec

from k2cli.agent.software import Software
from k2cli.choices import Device
from k2cli.cluster.facts.machine import Condition, InterfaceKind, MachineFacts, OsName
from k2cli.cluster.facts.probes import RawProbes
from k2cli.errors import ClusterError
from k2cli.files import decode_json
from k2cli.planning.hardware.gpus import Gpu, gpu_of, parse_gpus
from k2cli.planning.hardware.machine import OS_RESERVE_BYTES, OS_RESERVE_SHARE
from k2cli.units import whole_number

_OS: OsName = "linux"
# Names by udev and the kernel: wl* is wireless, thunderbolt* the IP-over-Thunderbolt driver.
_KINDS_BY_NAME: tuple[tuple[str, InterfaceKind], ...] = (
    ("wl", "wifi"),
    ("thunderbolt", "thunderbolt"),
    ("tb", "thunderbolt"),
    ("docker", "other"),
    ("virbr", "other"),
)
_ETHERNET_DRIVERS = frozenset({"", "veth", "vlan", "bond", "macvlan", "ipvlan", "team"})


def machine(raw: RawProbes, software: Software | None) -> MachineFacts:
    """Read the facts of a Linux machine.

    Raises:
        ClusterError: if its memory is not known.
    """
    memory = _memory_bytes(raw, software)
    gpus = _gpus(raw, software)
    limit, mark, source, device = _limit(memory, gpus, software)
    entries = _interface_entries(raw)
    interfaces, kinds = _interfaces(entries, software)
    release = os_release(raw.text("os-release") or "")
    return MachineFacts(
        hostname=(raw.text("hostname") or "").strip(),
        os_name=_OS,
        os_version=" ".join(filter(None, [release.get("NAME"), release.get("VERSION_ID")])),
        model=None,
        chip=gpus[0].name.name if gpus else _cpu(raw.text("cpuinfo") or ""),
        memory_bytes=memory,
        limit_bytes=limit,
        limit_mark=mark,
        limit_source=source,
        backend=device,
        bandwidth_bytes_per_second=None,
        interfaces=interfaces,
        interface_kinds=kinds,
        rdma_devices=tuple((raw.text("infiniband") or "").split()),
        prefix_lengths=_prefix_lengths(entries or []),
        gpus=gpus,
    )


def condition(raw: RawProbes) -> Condition:
    """Read the present condition of a Linux machine, without its clock."""
    available = meminfo(raw.text("meminfo") or "").get("MemAvailable")
    return Condition(available_bytes=available)


def os_release(text: str) -> dict[str, str]:
    """Parse ``/etc/os-release``: lines of ``NAME=value`` or ``NAME="value"``."""
    pairs = (line.split("=", 1) for line in text.splitlines() if "=" in line)
    return {name: value.strip().strip('"') for name, value in pairs}


def meminfo(text: str) -> dict[str, int]:
    """Parse ``/proc/meminfo`` into bytes; its ``kB`` are 1024 bytes."""
    found = re.findall(r"^(\S+):\s+(\d{1,18}) kB$", text, re.MULTILINE)
    return {name: int(value) * 1024 for name, value in found}


def _memory_bytes(raw: RawProbes, software: Software | None) -> int:
    """Return the physical memory, or the control group's limit if that is less (containers)."""
    memory = meminfo(raw.text("meminfo") or "").get("MemTotal")
    if memory is None:
        if software is None:
            raise ClusterError(f"node {raw.node} does not report its memory size")
        return software.memory_bytes
    for name in ("cgroup", "cgroup-v1"):
        limit = whole_number((raw.text(name) or "").strip())
        if limit is not None:
            memory = min(memory, limit)
    return memory


def _gpus(raw: RawProbes, software: Software | None) -> tuple[Gpu, ...]:
    """Return the GPUs that MLX may use, or else all that nvidia-smi lists."""
    if software is not None and software.gpus:
        return software.gpus
    return tuple(gpu_of(listed) for listed in parse_gpus(raw.text("nvidia-gpus") or ""))


def _limit(
    memory: int, gpus: tuple[Gpu, ...], software: Software | None
) -> tuple[int, Any, str, Device]:
    """Return the memory that MLX may use: mlx's own figure, or else the planner's assumption."""
    if software is not None and software.limit_bytes is not None and software.device is not None:
        return software.limit_bytes, software.limit_mark, software.limit_source, software.device
    if gpus:
        limit = max(gpu.idle_limit_bytes for gpu in gpus)
        return limit, "assumed", "the GPU's memory; mlx there could not be asked", "cuda"
    reserve = max(OS_RESERVE_BYTES, int(memory * OS_RESERVE_SHARE))
    return memory - reserve, "assumed", "memory less what the system is assumed to keep", "cpu"


def _cpu(text: str) -> str:
    return text.partition(":")[2].strip() or "unknown processor"


def _interface_entries(raw: RawProbes) -> list[dict[str, Any]] | None:
    """Return the entries of ``ip`` for interfaces that are up; None without ``ip``."""
    text = raw.text("ip")
    if text is None:
        return None
    try:
        entries = decode_json(text, type=list[dict[str, Any]])
    except msgspec.DecodeError as error:
        raise ClusterError(f"node {raw.node}: ip printed no JSON: {error}") from None
    return [entry for entry in entries if "UP" in entry.get("flags", [])]


def _interfaces(
    entries: list[dict[str, Any]] | None, software: Software | None
) -> tuple[dict[str, tuple[str, ...]], dict[str, InterfaceKind]]:
    if entries is None:
        known = software.interfaces if software is not None else {}
        addresses = {name: _ordered(list(found)) for name, found in known.items()}
        return addresses, {name: _kind(name, "", None) for name in addresses}
    addresses = {entry["ifname"]: _addresses(entry) for entry in entries}
    kinds = {
        entry["ifname"]: _kind(
            entry["ifname"], entry.get("link_type", ""), entry.get("linkinfo", {}).get("info_kind")
        )
        for entry in entries
    }
    return addresses, kinds


def _prefix_lengths(entries: list[dict[str, Any]]) -> dict[str, int]:
    found = [a for entry in entries for a in entry.get("addr_info", []) if "prefixlen" in a]
    return {address["local"]: int(address["prefixlen"]) for address in found}


def _addresses(entry: dict[str, Any]) -> tuple[str, ...]:
    usable = [a["local"] for a in entry.get("addr_info", []) if a.get("scope") != "link"]
    return _ordered(usable)


def _ordered(addresses: list[str]) -> tuple[str, ...]:
    """Sort IPv4 first and drop link-local IPv6, which is usable only with an interface's name."""
    kept = [address for address in addresses if not address.lower().startswith("fe80")]
    return tuple(sorted(kept, key=lambda address: ":" in address))


def _kind(name: str, link_type: str, driver: str | None) -> InterfaceKind:
    if link_type == "loopback" or name == "lo":
        return "loopback"
    for prefix, kind in _KINDS_BY_NAME:
        if name.startswith(prefix):
            return kind
    plain = name.startswith(("en", "eth")) if not link_type else link_type == "ether"
    return "ethernet" if plain and (driver or "") in _ETHERNET_DRIVERS else "other"
