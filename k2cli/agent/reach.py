"""Test of the addresses between two machines: a listener on one, connections from the other.

The listener answers with a random word that the connecting side is told. An address may exist on
both machines (every docker host has 172.17.0.1); then another program answers, without the word.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import select
import signal
import socket
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import msgspec

CONNECT_SECONDS = 3.0
_AT_ONCE = 16
_BACKLOG = 64
_ACCEPT_SECONDS = 1.0


class Target(msgspec.Struct, frozen=True):
    """An address to try, and the word that its listener must send."""

    address: str
    port: int
    word: str


class Answer(msgspec.Struct, frozen=True):
    """Result of one try. ``local`` is the own address that the connection was made from."""

    address: str
    seconds: float | None = None
    local: str | None = None
    error: str | None = None


class Listening(msgspec.Struct, frozen=True):
    """Ports and word of a machine's listener; ``port_v6`` is None without IPv6."""

    port: int
    word: str
    port_v6: int | None = None


def try_targets(targets: list[Target]) -> list[Answer]:
    """Connect to all targets at once, each within ``CONNECT_SECONDS``."""
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        return list(pool.map(_try, targets))


def _try(target: Target) -> Answer:
    try:
        # The first connection may include the search for the neighbour's hardware address.
        _connect(target)
        seconds, local, word = _connect(target)
    except OSError as error:
        reason = "no answer" if isinstance(error, TimeoutError) else error.strerror or str(error)
        return Answer(target.address, error=reason)
    if word != target.word:
        return Answer(target.address, error="another machine answers at this address")
    return Answer(target.address, seconds, local)


def _connect(target: Target) -> tuple[float, str, str]:
    began = time.perf_counter()
    with socket.create_connection((target.address, target.port), CONNECT_SECONDS) as client:
        seconds = time.perf_counter() - began
        word = client.recv(len(target.word)).decode(errors="replace")
        return seconds, str(client.getsockname()[0]), word


def listen(seconds: float) -> None:
    """Print ``Listening`` on stdout and answer connections until stdin closes or time is up."""
    signal.alarm(int(seconds) + 5)  # ends this process in any case
    word = secrets.token_hex(8)
    sockets = [_listener(socket.AF_INET, "0.0.0.0")]
    with contextlib.suppress(OSError):  # no IPv6 here: ``port_v6`` is None
        sockets.append(_listener(socket.AF_INET6, "::"))
    ports = [each.getsockname()[1] for each in sockets]
    told = Listening(ports[0], word, ports[1] if len(ports) > 1 else None)
    os.write(1, msgspec.json.encode(told) + b"\n")
    # A plain clock, as that of the alarm above.
    _serve(sockets, word.encode(), time.monotonic() + seconds)


def _listener(family: socket.AddressFamily, host: str) -> socket.socket:
    listener = socket.socket(family, socket.SOCK_STREAM)
    if family == socket.AF_INET6:
        listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    listener.bind((host, 0))
    listener.listen(_BACKLOG)
    # On macOS a connection may vanish between ``select`` and ``accept``, which would then wait.
    listener.settimeout(_ACCEPT_SECONDS)
    return listener


def _serve(sockets: list[socket.socket], word: bytes, until: float) -> None:
    while (left := until - time.monotonic()) > 0:
        by_number = {each.fileno(): each for each in sockets}
        ready, _, _ = select.select([*by_number, 0], [], [], left)
        if 0 in ready and not os.read(0, 1):
            return
        for number in set(ready) - {0}:
            with contextlib.suppress(OSError):  # a stranger that is gone again
                connection, _ = by_number[number].accept()
                with connection:
                    connection.sendall(word)


if __name__ == "__main__":
    listen(float(sys.argv[1]))
