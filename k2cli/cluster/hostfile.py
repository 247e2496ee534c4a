"""Hostfiles of other launchers: MLX's JSON, and the lines of Open MPI.

k2's own descriptions hold more; these formats import clusters, and MLX's is exported, too. MLX's is
read as ``mlx._distributed_utils.common.Hostfile`` (mlx 0.32.4) reads it: an object with
``backend``, ``envs`` and ``hosts``, or a bare list of hosts; per host the name for ssh, addresses
for the ring, and per rank the RDMA devices towards it (null for itself). A host that is listed
twice has two ranks. Open MPI's has a host per line, with ``slots=N`` for N ranks, which add up if
the host comes again.
"""

from __future__ import annotations

import codecs
import re
from pathlib import Path

import msgspec

from k2cli.errors import UsageError
from k2cli.files import decode_json, read_regular
from k2cli.units import MIB

_EXAMPLE = (
    'it looks like {"backend": "ring", "envs": [], "hosts": [{"ssh": "a", "ips": ["…"]}]}, '
    "or has a line per host, like: studio-1 slots=1"
)
_WITHOUT_FILE = "k2 cluster init localhost studio-2 --name studios"
_MAX_RANKS = 1024
# Name, optional ":slots" (MPICH) and Open MPI's optional settings.
_LINE = re.compile(r"(?P<name>[A-Za-z0-9._@%+^-]+)(:(?P<count>[0-9]+))?(?P<settings>(\s+\S+)*)")
_SLOTS = re.compile(r"(?<![\w-])slots\s*=\s*(\S+)")
_LINE_SETTINGS = re.compile(r"(\s*\b(slots|max[_-]slots)\s*=\s*[0-9]+)*\s*")
_LIMIT_BYTES = 4 * MIB
_ADDRESS = re.compile(r"[A-Za-z0-9._:%-]+")  # a name is possible, too, as in MLX
_SETTING = re.compile(r"[A-Za-z_][A-Za-z0-9_]*(=|$)", re.ASCII)


class Host(msgspec.Struct, frozen=True):
    """One rank. ``rdma`` has an entry per rank: a device, several, or none (itself)."""

    ssh: str
    ips: tuple[str, ...] = ()
    rdma: tuple[str | tuple[str, ...] | None, ...] = ()


class Hostfile(msgspec.Struct, frozen=True):
    """A whole hostfile. ``backend`` may be empty; ``envs`` are ``NAME=value`` for every rank."""

    hosts: tuple[Host, ...]
    backend: str = ""
    envs: tuple[str, ...] = ()


def rank_environment(hostfile: Hostfile) -> dict[str, str]:
    """Return the variables that ``envs`` sets; a name alone is empty, as in MLX's launcher."""
    parts = (text.partition("=") for text in hostfile.envs)
    return {name: value for name, _, value in parts}


def read_hostfile(path: Path) -> Hostfile:
    """Read a hostfile.

    Raises:
        UsageError: if it cannot be read or is not a hostfile.
    """
    try:
        text = read_regular(path, _LIMIT_BYTES, follow_links=True)
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}", _WITHOUT_FILE) from error
    return parse_hostfile(text, str(path))


def parse_hostfile(text: bytes, source: str) -> Hostfile:
    """Read the text of a hostfile; ``source`` names it in messages.

    Raises:
        UsageError: if it is not a hostfile, has no host, or its RDMA devices connect not all ranks.
    """
    text = text.removeprefix(codecs.BOM_UTF8)
    if text.lstrip()[:1] in (b"{", b"[") or text.strip() in (b"null", b"true", b"false"):
        hostfile = _parse_mlx(text, source)
    else:
        hostfile = _parse_lines(text, source)
    _check(hostfile, source)
    return hostfile


def _parse_mlx(text: bytes, source: str) -> Hostfile:
    try:
        document = decode_json(text, object)
        if isinstance(document, list):
            document = {"hosts": document}
        return msgspec.convert(document, type=Hostfile)
    except msgspec.MsgspecError as error:
        raise UsageError(f"{source} is not an MLX hostfile: {error}", _EXAMPLE) from error


def _parse_lines(text: bytes, source: str) -> Hostfile:
    """Read Open MPI's form; ``max_slots`` and comments change nothing.

    Source: https://docs.open-mpi.org/en/v5.0.x/launching-apps/scheduling.html
    """
    try:
        lines = text.decode().splitlines()
    except UnicodeDecodeError:
        raise UsageError(f"{source} is not a hostfile: it is not UTF-8", _EXAMPLE) from None
    counts: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        line = line.partition("#")[0].strip()
        if not line:
            continue
        name, slots = _parse_line(line, f"line {number} of {source}")
        counts[name] = counts.get(name, 0) + slots
        if sum(counts.values()) > _MAX_RANKS:
            raise UsageError(f"{source} names more than {_MAX_RANKS} ranks")
    return Hostfile(tuple(Host(name) for name, count in counts.items() for _ in range(count)))


def _parse_line(line: str, place: str) -> tuple[str, int]:
    found = _LINE.fullmatch(line)
    if found is None or found["name"].startswith(("^", "+", "-")):
        raise UsageError(f"{place} is not a host: '{line[:80]}'", _EXAMPLE)
    settings = found["settings"].strip()
    slots = _SLOTS.search(settings)
    if _LINE_SETTINGS.fullmatch(settings) is None:
        value = slots[1] if slots else settings
        raise UsageError(f"{place} has '{value[:80]}', which is not slots=N", _EXAMPLE)
    count = slots[1] if slots else found["count"] or "1"
    if len(count) > 4 or not 0 < int(count) <= _MAX_RANKS:
        raise UsageError(f"{place} has {count[:20]} slots: between 1 and {_MAX_RANKS} are possible")
    return found["name"], int(count)


def _check(hostfile: Hostfile, source: str) -> None:
    if not hostfile.hosts:
        raise UsageError(f"{source} names no host", _EXAMPLE)
    if len(hostfile.hosts) > _MAX_RANKS:
        raise UsageError(f"{source} names more than {_MAX_RANKS} ranks")
    for text in hostfile.envs:
        if _SETTING.match(text) is None:
            raise UsageError(f"{source}: '{text}' in envs is not NAME=value")
    for host in hostfile.hosts:
        if not host.ssh or host.ssh.startswith("-"):
            raise UsageError(f"{source}: '{host.ssh}' cannot be the name of a host")
        for address in host.ips:
            if _ADDRESS.fullmatch(address) is None:
                raise UsageError(f"{source}: '{address}' of host {host.ssh} is not an address")
        if host.rdma and len(host.rdma) != len(hostfile.hosts):
            raise UsageError(
                f"{source}: host {host.ssh} has {len(host.rdma)} RDMA entries "
                f"for {len(hostfile.hosts)} hosts"
            )
    if hostfile.backend in ("jaccl", "jaccl-ring") or any(host.rdma for host in hostfile.hosts):
        _check_rdma(hostfile, source)


def _check_rdma(hostfile: Hostfile, source: str) -> None:
    """Refuse RDMA devices that leave two ranks without a connection.

    MLX's JACCL starts without a word if one is missing, and hangs or crashes at the first sum. A
    ring needs its neighbours only.
    """
    hosts, ring = hostfile.hosts, hostfile.backend == "jaccl-ring"
    for rank, host in enumerate(hosts):
        if len(hosts) > 1 and not host.rdma:
            raise UsageError(f"{source}: rank {rank} ({host.ssh}) names no RDMA devices")
        if host.rdma and host.rdma[rank]:
            raise UsageError(
                f"{source}: rank {rank} ({host.ssh}) has {host.rdma[rank]} towards itself",
                "the entry at a rank's own place is null; the order is that of the hosts",
            )
        neighbours = {(rank - 1) % len(hosts), (rank + 1) % len(hosts)} - {rank}
        others = neighbours if ring else set(range(len(hosts))) - {rank}
        missing = [other for other in sorted(others) if not host.rdma[other]]
        if missing:
            other = hosts[missing[0]].ssh
            raise UsageError(
                f"{source}: rank {rank} ({host.ssh}) has no RDMA device towards "
                f"rank {missing[0]} ({other})",
                "every two ranks need a cable; without, use backend ring"
                if not ring
                else "each rank needs a cable to the next; put the hosts into that order",
            )


def format_hostfile(hostfile: Hostfile) -> str:
    """Format a hostfile as JSON, with the order of keys and the indent of MLX's own."""
    document = {
        "backend": hostfile.backend,
        "envs": list(hostfile.envs),
        "hosts": [
            {"ssh": host.ssh, "ips": list(host.ips), "rdma": list(host.rdma)}
            for host in hostfile.hosts
        ],
    }
    return msgspec.json.format(msgspec.json.encode(document), indent=4).decode()
