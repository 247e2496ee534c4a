"""Redaction of probe output: identifying text becomes pseudonyms, facts for checks stay.

A value has the same pseudonym in every probe of every node, so the topology is preserved: addresses
of one network stay in one network, and the domain UUIDs at the two ends of a cable still match. Of
structured output only the fields listed here are kept.
"""

from __future__ import annotations

import hashlib
import ipaddress
import json
import re
import secrets
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from k2cli.files import decode_json

_MAC = re.compile(r"\b[0-9A-Fa-f]{2}(?:[:-][0-9A-Fa-f]{2}){5}\b")
_UUID = re.compile(r"\b[0-9A-Fa-f]{8}(?:-[0-9A-Fa-f]{4}){3}-[0-9A-Fa-f]{12}\b")
_GUID = re.compile(r"\b(?:0x)?[0-9A-Fa-f]{16}\b|\b[0-9A-Fa-f]{4}(?::[0-9A-Fa-f]{4}){3}\b(?!:)")
_IPV4 = re.compile(r"(?<![\d.])(?:\d{1,3}\.){3}\d{1,3}(?![\d.])")
_IPV6 = re.compile(r"(?<![\w:.])[0-9A-Fa-f:]*:[0-9A-Fa-f:]*:[0-9A-Fa-f:.]*(?![\w:])")
_HOME = re.compile(r"/(?:Users|home)/[^\s\"',:;]+")
_VOLUME = re.compile(r"/Volumes/[^\"\n]+")
_AT = re.compile(r"\b[\w.+-]+@[\w.-]+")
_DOMAIN = re.compile(r"\b([\w-]+)\.(local|lan|home|internal|localdomain|ts\.net)\b")
# Parts of paths that do not identify anyone; all others get pseudonyms.
_PLAIN_PART = re.compile(
    r"|Users|home|root|Volumes|System|Library|Frameworks|Versions|Data|Shared|usr|opt|var|tmp|mnt|"
    r"srv|data|bin|sbin|lib|lib64|local|share|homebrew|Cellar|Caskroom|miniforge3?|\.local|\.k2|"
    r"\.cache|huggingface|hub|env|envs|venv|\.venv|k2|models|demo|\d+(?:\.\d+)*|"
    r"[Pp]ython[\d.]*(?:\.framework)?|mpirun|libmpi[\w.]*|\w+-linux-gnu|open-?mpi|"
    r"model[\w-]*\.safetensors|site-packages|(?:user|volume|folder)-\d+"
)
_PATH_FIELDS = frozenset({"path", "python", "program", "mpirun", "libmpi", "mount_point"})

_PLAIN_PROCESS = re.compile(
    r"(python[\d.]*|Python|mpirun|orted|prted|k2|ollama|LM Studio|kernel_task|WindowServer|sshd)"
)
_PLAIN_INTERFACE = re.compile(
    r"(lo|en|eth|wl|wlan|veth|br|bridge|docker|tun|tap|utun|ib|bond|usb|thunderbolt|tb|wg|virbr|"
    r"ifb|awdl|llw|anpi|ap|gif|stf|vmenet|pdp_ip)[\dspfnx]*"
)
_PLAIN_DEVICE = re.compile(r"(MacBook Pro|MacBook Air|Mac Studio|Mac mini|Mac Pro|iMac|Mac\d+,\d+)")
_PLAIN_PORT = re.compile(
    r"(Ethernet( Adapter \(en\d+\))?|Wi-Fi|AirPort|Thunderbolt (\d+|Bridge)|Bluetooth PAN|"
    r"USB [\d/.G]+ LAN|iPhone USB|iPad USB)"
)
_DAEMONS = frozenset(
    {
        "powerd",
        "sharingd",
        "coreaudiod",
        "bluetoothd",
        "caffeinate",
        "screensharingd",
        "runningboardd",
    }
)
# Fields of system_profiler and of ip that are kept; all others are dropped.
_PROFILE_FIELDS = """SPHardwareDataType SPThunderboltDataType SPDisplaysDataType _items _name
    chip_type machine_model machine_name number_processors physical_memory device_name_key
    domain_uuid_key mode_key receptacle_id_key receptacle_status_key current_speed_key
    link_status_key micro_version_key route_string_key sppci_cores sppci_model spdisplays_vendor
    services_title protocol_id_key protocol_version_key protocol_revision_key vendor_name_key"""
_IP_FIELDS = """ifindex ifname flags mtu operstate link_type address addr_info family local
    prefixlen scope linkinfo info_kind master"""
_RECEPTACLE = re.compile(r"receptacle_\w+_tag")
# Probes without names of machines or persons; words in them are not names ("Apple M3 Ultra").
_NAMELESS = frozenset({"system_profiler", "sysctl", "sw_vers", "vm_stat", "meminfo", "cpuinfo"})


class Redactor:
    """Pseudonyms of one recording. The secret ``key`` protects the host parts of addresses."""

    def __init__(self, key: bytes | None = None) -> None:
        self._key = key if key is not None else secrets.token_bytes(16)
        self._given: dict[str, dict[str, str]] = {}
        self._names: dict[str, str] = {}

    # --- pseudonyms -----------------------------------------------------------------------------

    def know_name(self, kind: str, name: str) -> str:
        """Register a name of a ``node``, ``host`` or ``user`` to replace; returns its pseudonym."""
        name = name.strip()
        if not name or name == "localhost":
            return name
        pseudonym = self._pseudonym(kind, name.lower(), f"{kind}-{{}}")
        self._names[name.lower()] = pseudonym
        return pseudonym

    def _pseudonym(self, kind: str, value: str, form: str) -> str:
        given = self._given.setdefault(kind, {})
        return given.setdefault(value, form.format(len(given) + 1))

    def _number(self, kind: str, value: str) -> int:
        given = self._given.setdefault(kind, {})
        return int(given.setdefault(value, str(len(given) + 1)))

    # --- text -----------------------------------------------------------------------------------

    def text(self, text: str, *, names: bool = True) -> str:
        """Redact addresses, identifiers and paths in any text, and names if ``names`` is True."""
        for pattern in (_HOME, _VOLUME):
            text = pattern.sub(lambda match: self.path(match.group(0)), text)
        text = _AT.sub("user@host", text)
        text = _UUID.sub(self._uuid, text)
        text = _MAC.sub(self._mac, text)
        text = _GUID.sub(self._guid, text)
        text = _IPV6.sub(self._ipv6, text)
        text = _IPV4.sub(self._ipv4, text)
        text = self._known_names(text) if names else text
        return _DOMAIN.sub(self._domain, text)

    def _known_names(self, text: str) -> str:
        if not self._names:
            return text
        # Longest first: "studio.local" before "studio".
        names = sorted(self._names, key=len, reverse=True)
        pattern = "|".join(re.escape(name) for name in names)
        return re.sub(
            rf"(?<![\w-])(?:{pattern})(?![\w-])",
            lambda match: self._names[match.group(0).lower()],
            text,
            flags=re.IGNORECASE,
        )

    def path(self, path: str) -> str:
        """Replace all parts of a path that are not common to all machines by pseudonyms."""
        parts = path.split("/")
        for index, part in enumerate(parts):
            before = parts[index - 1] if index else ""
            if before in ("Users", "home") and not _PLAIN_PART.fullmatch(part):
                parts[index] = self.know_name("user", part)
            elif before == "Volumes" and not _PLAIN_PART.fullmatch(part):
                parts[index] = self._pseudonym("volume", part, "volume-{}")
            elif not _PLAIN_PART.fullmatch(part):
                parts[index] = self._pseudonym("folder", part, "folder-{}")
        return "/".join(parts)

    def _domain(self, match: re.Match[str]) -> str:
        if re.fullmatch(r"(?:node|host)-\d+", match.group(1)):
            return match.group(0)
        return f"{self._pseudonym('host', match.group(1).lower(), 'host-{}')}.local"

    def _uuid(self, match: re.Match[str]) -> str:
        number = self._number("uuid", match.group(0).lower())
        return f"00000000-0000-4000-8000-{number:012d}"

    def _mac(self, match: re.Match[str]) -> str:
        value = match.group(0).lower().replace("-", ":")
        if value in ("00:00:00:00:00:00", "ff:ff:ff:ff:ff:ff"):
            return value
        number = self._number("mac", value)
        return f"02:00:00:00:{number >> 8:02x}:{number & 255:02x}"

    def _guid(self, match: re.Match[str]) -> str:
        value = match.group(0)
        number = self._number("guid", value.lower().replace(":", "").removeprefix("0x"))
        if ":" in value:
            return ":".join(f"{number:016x}"[i : i + 4] for i in range(0, 16, 4))
        return f"{'0x' if value.startswith('0x') else ''}{number:016x}"

    def _ipv4(self, match: re.Match[str]) -> str:
        """Map each /16 to 10.N, and keep the lengths of common prefixes within it."""
        try:
            address = ipaddress.IPv4Address(match.group(0))
        except ValueError:
            return match.group(0)  # a version number of four parts
        if address.is_loopback or address.is_unspecified or int(address) >> 24 in (0, 255):
            return match.group(0)
        high, low = int(address) >> 16, self._mixed(int(address))
        if address.is_link_local:
            return str(ipaddress.IPv4Address(high << 16 | low))
        group = self._number("network", f"{high:x}")
        return str(ipaddress.IPv4Address((10 << 24 | (group & 255) << 16) | low))

    def _mixed(self, address: int) -> int:
        """Flip each of the low 16 bits or not, depending on the bits above it and the key."""
        low = 0
        for bit in range(15, -1, -1):
            above = (address >> (bit + 1)).to_bytes(4, "big") + bytes([bit])
            flip = hashlib.blake2b(above, key=self._key, digest_size=1).digest()[0] & 1
            low |= ((address >> bit & 1) ^ flip) << bit
        return low

    def _ipv6(self, match: re.Match[str]) -> str:
        text = match.group(0)
        try:
            address = ipaddress.IPv6Address(text)
        except ValueError:
            return text  # a time of day
        if address.is_loopback or address.is_unspecified:
            return text
        host = self._number("host6", str(address))
        if address.is_link_local:
            return f"fe80::{host:x}"
        return f"fd00:0:0:{self._number('network6', f'{int(address) >> 64:x}'):x}::{host:x}"

    # --- probes ---------------------------------------------------------------------------------

    def probe(self, name: str, stdout: str) -> str:
        """Redact the output of one probe according to its format."""
        if not stdout.strip():
            return stdout
        special: dict[str, Callable[[str], str]] = {
            "hostname": lambda text: self.know_name("host", text.strip()) + "\n",
            "system_profiler": lambda text: self._json(text, self._profile),
            "ip": lambda text: self._json(text, self._ip),
            "k2": lambda text: self._json(text, self._software),
            "networksetup": self._ports,
            "pmset": self._assertions,
        }
        if name in special:
            stdout = special[name](stdout)
        return self.text(stdout, names=name not in _NAMELESS)

    def _json(self, text: str, change: Callable[[Any], Any]) -> str:
        try:
            return json.dumps(change(decode_json(text, type=object)), indent=1) + "\n"
        except (ValueError, TypeError, AttributeError, KeyError, RecursionError):
            return "not JSON\n"  # text of an unknown form cannot be redacted safely

    def _profile(self, value: Any, key: str = "") -> Any:
        if isinstance(value, dict):
            kept = (k for k in value if k in _PROFILE_FIELDS.split() or _RECEPTACLE.fullmatch(k))
            return {k: self._profile(value[k], k) for k in kept}
        if isinstance(value, list):
            return [self._profile(each, key) for each in value]
        if key in ("_name", "device_name_key", "vendor_name_key") and isinstance(value, str):
            plain = re.fullmatch(
                r"thunderboltusb4_bus_\d+|hardware_overview|Apple M\d.*|Apple Inc\.|service_ip|"
                r"unknown_xd_service|kHW_\w+",
                value,
            )
            if not plain and not _PLAIN_DEVICE.fullmatch(value):
                return self._pseudonym("device", value, "device-{}")
        return value

    def _ip(self, value: Any, key: str = "") -> Any:
        if isinstance(value, dict):
            return {k: self._ip(each, k) for k, each in value.items() if k in _IP_FIELDS.split()}
        if isinstance(value, list):
            return [self._ip(each, key) for each in value]
        return self.interface(value) if key in ("ifname", "master") else value

    def interface(self, name: str) -> str:
        """Keep names given by systems; replace others, which may identify a person."""
        if _PLAIN_INTERFACE.fullmatch(name) or re.fullmatch(r"interface-\d+", name):
            return name
        return self._pseudonym("interface", name, "interface-{}")

    def _software(self, value: dict[str, Any]) -> dict[str, Any]:
        for process in value.get("processes", []):
            if not _PLAIN_PROCESS.fullmatch(str(process.get("name"))):
                process["name"] = self._pseudonym("process", str(process["name"]), "process-{}")
            if process.get("run_id"):
                process["run_id"] = self.run_id(process["run_id"])
        for owner in (value, value.get("volume") or {}, value.get("state_volume") or {}):
            for field in _PATH_FIELDS & owner.keys():
                owner[field] = self.path(owner[field]) if owner[field] else owner[field]
        mpi = value.get("mpi_versions", {})
        value["mpi_versions"] = {self.path(path): version for path, version in mpi.items()}
        named = value.get("interfaces", {})
        value["interfaces"] = {self.interface(name): each for name, each in named.items()}
        return value

    def run_id(self, run_id: str) -> str:
        """Replace a run's id, which begins with the name of its model."""
        if re.fullmatch(r"run-\d{4}", run_id):
            return run_id
        return f"run-{self._number('run', run_id):04d}"

    def _ports(self, text: str) -> str:
        def port(match: re.Match[str]) -> str:
            name = match.group(2)
            kept = _PLAIN_PORT.fullmatch(name)
            return match.group(1) + (name if kept else self._pseudonym("port", name, "Port {}"))

        return re.sub(r"^(\s*Hardware Port: )(.*)$", port, text, flags=re.MULTILINE)

    def _assertions(self, text: str) -> str:
        def prevented(match: re.Match[str]) -> str:
            names = [name.strip() for name in match.group(1).split(",")]
            kept = [name if name in _DAEMONS else "a program" for name in names]
            return f"(sleep prevented by {', '.join(kept)})"

        return re.sub(r"\(sleep prevented by (.*?)\)", prevented, text)

    def document(self, value: Any) -> Any:
        """Redact the texts of a JSON value; fields for interfaces and paths have own rules."""
        if isinstance(value, Mapping):
            return {self._key_text(k): self._field(k, each) for k, each in value.items()}
        if isinstance(value, list | tuple):
            return [self.document(each) for each in value]
        return self.text(value) if isinstance(value, str) else value

    def _key_text(self, key: str) -> str:
        return self._known_names(key)

    def _field(self, key: str, value: Any) -> Any:
        if isinstance(value, str) and key in ("interface", "target_interface"):
            return self.interface(value)
        if isinstance(value, str) and key in _PATH_FIELDS:
            return self.path(value)
        return self.document(value)


def names_in(hostnames: Iterable[str]) -> list[str]:
    """List each host name with and without its domain."""
    found: dict[str, None] = {}
    for name in hostnames:
        stripped = name.strip()
        found.setdefault(stripped)
        found.setdefault(stripped.partition(".")[0])
    return [name for name in found if name]
