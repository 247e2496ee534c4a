"""TCP ports of this machine, which of them are free or whose they are, and its own addresses."""

from __future__ import annotations

import errno
import os
import random
import socket
import sys

import psutil

# Below what Linux and macOS give to outgoing connections, so that none takes a port in between.
_PORTS = range(20_000, 32_000)


def free_ports(count: int) -> list[int]:
    """Different TCP ports that nothing on this machine listens on."""
    found: list[int] = []
    while len(found) < count:
        port = random.choice(_PORTS)
        if port not in found and _can_listen("", port) and _can_listen("127.0.0.1", port):
            found.append(port)
    return found


def _can_listen(host: str, port: int) -> bool:
    """Whether an address can be bound; an address that is not this machine's raises.

    Raises:
        OSError: for any other reason than that the port is taken or needs privileges.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
            probe.listen(1)
        except OSError as error:
            if error.errno in (errno.EADDRINUSE, errno.EACCES):
                return False
            raise
    return True


def port_holder(host: str, port: int) -> str | None:
    """None if the port can be used; else who holds it, or why not, as far as can be told."""
    try:
        if _can_listen(host, port) and not _is_answered(port):
            return None
    except OSError as error:
        return f"{host} is no address of this machine ({error.strerror})"
    if port < 1024 and os.geteuid() != 0:
        return "ports below 1024 need root"
    return _listener(port) or "another process"


def _is_answered(port: int) -> bool:
    """macOS lets a process bind a port beside one that listens on all addresses."""
    if sys.platform == "linux":
        return False
    with socket.socket() as client:
        client.settimeout(0.5)
        return client.connect_ex(("127.0.0.1", port)) == 0


def _listener(port: int) -> str | None:
    try:
        for connection in psutil.net_connections("tcp"):
            if (
                connection.status == psutil.CONN_LISTEN
                and connection.laddr
                and connection.laddr.port == port
                and connection.pid
            ):
                command = " ".join(psutil.Process(connection.pid).cmdline())
                return f"process {connection.pid} ({command[:80]})"
    except psutil.Error:
        return None  # whose it is, is another user's secret
    return None


def choose_port(host: str, first: int) -> int:
    """The first free port from ``first`` on.

    Raises:
        OSError: if ``host`` is no address of this machine.
    """
    for port in range(first, min(first + 1000, 2**16)):
        if _can_listen(host, port) and not _is_answered(port):
            return port
    return free_ports(1)[0]


def address_towards(host: str) -> str:
    """This machine's own address on the way to ``host``.

    Raises:
        OSError: if there is no route, or the name is unknown.
    """
    family, kind, protocol, _, address = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.connect(address)  # of a datagram socket: chooses the route, sends nothing
        return str(probe.getsockname()[0])
