"""MLX's hostfile: the JSON that ``mlx.launch`` and ``mlx.distributed_config`` read and write.

k2's own descriptions hold more; this format imports clusters from MLX's tools and exports them. It
is read as ``mlx._distributed_utils.common.Hostfile`` (mlx 0.32.4) reads it: an object with
``backend``, ``envs`` and ``hosts``, or a bare list of hosts; per host the name for ssh, addresses
for the ring, and per rank the RDMA devices towards it (null for itself).
"""

from __future__ import annotations

import re
from pathlib import Path

import msgspec

from k2cli.errors import UsageError
from k2cli.files import decode_json

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
        text = path.read_bytes()
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from error
    return parse_hostfile(text, str(path))


def parse_hostfile(text: bytes, source: str) -> Hostfile:
    """Read the text of a hostfile; ``source`` names it in messages.

    Raises:
        UsageError: if it is not a hostfile, or has no host, or RDMA lists of the wrong length.
    """
    try:
        document = decode_json(text, object)
        if isinstance(document, list):
            document = {"hosts": document}
        hostfile = msgspec.convert(document, type=Hostfile)
    except msgspec.MsgspecError as error:
        raise UsageError(
            f"{source} is not an MLX hostfile: {error}",
            'it looks like {"backend": "ring", "envs": [], "hosts": [{"ssh": "a", "ips": ["…"]}]}',
        ) from error
    _check(hostfile, source)
    return hostfile


def _check(hostfile: Hostfile, source: str) -> None:
    if not hostfile.hosts:
        raise UsageError(f"{source} names no host")
    for text in hostfile.envs:
        if _SETTING.match(text) is None:
            raise UsageError(f"{source}: '{text}' in envs is not NAME=value")
    for host in hostfile.hosts:
        if not host.ssh or host.ssh.startswith("-"):
            raise UsageError(f"{source}: '{host.ssh}' cannot be the name of a host")
        if host.rdma and len(host.rdma) != len(hostfile.hosts):
            raise UsageError(
                f"{source}: host {host.ssh} has {len(host.rdma)} RDMA entries "
                f"for {len(hostfile.hosts)} hosts"
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
