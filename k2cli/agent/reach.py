"""Whether addresses of one machine are reached from another: a listener there, connections here.

The listener answers with a word that only the asking side and it know of, because an address may
exist on both machines (every docker host has a 172.17.0.1), and then something else answers.
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


class Target(msgspec.Struct, frozen=True):
    """An address to try, and the word that is to come back."""

    address: str
    port: int
    word: str


class Answer(msgspec.Struct, frozen=True):
    """What became of it: ``local`` is the own address that the connection left from."""

    address: str
    seconds: float | None = None
    local: str | None = None
    error: str | None = None


class Listening(msgspec.Struct, frozen=True):
    """Where the listener of a machine listens; ``port_v6`` is None without IPv6."""

    port: int
    word: str
    port_v6: int | None = None


def try_targets(targets: list[Target]) -> list[Answer]:
    """Connect to all of them at once, each within ``CONNECT_SECONDS``."""
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        return list(pool.map(_try, targets))


def _try(target: Target) -> Answer:
    try:
        # The first connection may pay for finding the neighbour's hardware address.
        _connect(target)
        seconds, local, word = _connect(target)
    except OSError as error:
        reason = "no answer" if isinstance(error, TimeoutError) else error.strerror or str(error)
        return Answer(target.address, error=reason)
    if word != target.word:
        return Answer(target.address, error="another machine answers there")
    return Answer(target.address, seconds, local)


def _connect(target: Target) -> tuple[float, str, str]:
    began = time.perf_counter()
    with socket.create_connection((target.address, target.port), CONNECT_SECONDS) as client:
        seconds = time.perf_counter() - began
        word = client.recv(len(target.word)).decode(errors="replace")
        return seconds, str(client.getsockname()[0]), word


def listen(seconds: float) -> None:
    """Tell on stdout where we listen, and answer everybody until stdin closes, or for so long."""
    signal.alarm(int(seconds) + 5)  # whatever happens, this process ends
    word = secrets.token_hex(8)
    sockets = [_listener(socket.AF_INET, "0.0.0.0")]
    with contextlib.suppress(OSError):  # no IPv6 here: told by ``port_v6``
        sockets.append(_listener(socket.AF_INET6, "::"))
    ports = [each.getsockname()[1] for each in sockets]
    told = Listening(ports[0], word, ports[1] if len(ports) > 1 else None)
    os.write(1, msgspec.json.encode(told) + b"\n")
    _serve(sockets, word.encode(), time.monotonic() + seconds)


def _listener(family: socket.AddressFamily, host: str) -> socket.socket:
    listener = socket.socket(family, socket.SOCK_STREAM)
    if family == socket.AF_INET6:
        listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    listener.bind((host, 0))
    listener.listen(_BACKLOG)
    return listener


def _serve(sockets: list[socket.socket], word: bytes, until: float) -> None:
    while (left := until - time.monotonic()) > 0:
        by_number = {each.fileno(): each for each in sockets}
        ready, _, _ = select.select([*by_number, 0], [], [], left)
        if 0 in ready and not os.read(0, 1):
            return
        for number in set(ready) - {0}:
            connection, _ = by_number[number].accept()
            with connection:
                connection.sendall(word)


if __name__ == "__main__":
    listen(float(sys.argv[1]))
