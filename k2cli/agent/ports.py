"""TCP ports of this machine: search for free ones, and for the process that holds one."""

from __future__ import annotations

import errno
import os
import random
import socket
import sys
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import psutil

from k2cli.settings import RUN_OPTION, is_run_id
from k2cli.system.processes import command_of
from k2cli.units import one_line

# Below the ports of outgoing connections on Linux and macOS, which could take one meanwhile.
_PORTS = range(20_000, 32_000)


def free_ports(count: int) -> list[int]:
    """Find different TCP ports that no process on this machine listens on."""
    found: list[int] = []
    while len(found) < count:
        port = random.choice(_PORTS)
        if port not in found and _can_listen("", port) and _can_listen("127.0.0.1", port):
            found.append(port)
    return found


def _can_listen(host: str, port: int) -> bool:
    """True if a server could listen there; False if the port is taken or needs privileges.

    Raises:
        OSError: for any other reason, such as an address of another machine.
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
    """Return None if the port can be used, else the process that holds it or another reason."""
    try:
        if _can_listen(host, port) and not _is_answered(port):
            return None
    except OSError as error:
        return f"{host} is no address of this machine ({error.strerror})"
    if port < 1024 and os.geteuid() != 0:
        return "ports below 1024 need root"
    return _listener(port) or "another process"


def _is_answered(port: int) -> bool:
    """True if a process listens there. macOS allows a bind beside a listener on all addresses."""
    if sys.platform == "linux":
        return False
    with socket.socket() as client:
        client.settimeout(0.5)
        return client.connect_ex(("127.0.0.1", port)) == 0


def _listener(port: int) -> str | None:
    """Describe the process that listens on a port; None if it is another user's."""
    for process, connection in _connections():
        if (
            connection.status == psutil.CONN_LISTEN
            and connection.laddr
            and connection.laddr.port == port
        ):
            return _described(process.pid, command_of(process))
    return None


def _described(pid: int, words: list[str]) -> str:
    """Name a process by its command line; a guard by its run, which ``k2 stop`` takes.

    Any program can choose its words, which are shown in a terminal.
    """
    if RUN_OPTION in words[:-1] and is_run_id(run := words[words.index(RUN_OPTION) + 1]):
        return f"run {run} of k2 (process {pid})"
    return f"process {pid} ({one_line(' '.join(words)[:80])})"


def _connections() -> Iterator[tuple[psutil.Process, Any]]:
    """Yield the TCP connections of processes that this user may look at."""
    if sys.platform == "linux":
        # This reads the system's table once. On macOS it needs root, and is refused as a whole.
        with suppress(psutil.Error):
            for each in psutil.net_connections("tcp"):
                with suppress(psutil.Error):
                    if each.pid:
                        yield psutil.Process(each.pid), each
        return
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            for connection in process.net_connections("tcp"):
                yield process, connection


def choose_port(host: str, first: int) -> int:
    """Find the first free port from ``first`` on.

    Raises:
        OSError: if ``host`` is no address of this machine.
    """
    for port in range(first, min(first + 1000, 2**16)):
        if _can_listen(host, port) and not _is_answered(port):
            return port
    return free_ports(1)[0]


def address_towards(host: str) -> str:
    """Return this machine's own address on the route to ``host``.

    Raises:
        OSError: if there is no route, or the name is unknown.
    """
    family, kind, protocol, _, address = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.connect(address)  # a datagram socket only chooses the route, and sends nothing
        return str(probe.getsockname()[0])
