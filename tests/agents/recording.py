"""A relay from a UNIX socket to a port of the loopback that keeps what passes through it."""

from __future__ import annotations

import contextlib
import json
import re
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

JOIN_SECONDS = 10
_STATUS = re.compile(rb"(?:^|\r\n)HTTP/1\.1 (\d{3}) ")


@dataclass(frozen=True, slots=True)
class Exchange:
    """A request that an agent sent, and how it was answered."""

    method: str
    path: str
    headers: dict[str, str]
    body: Any
    status: int | None
    answer: bytes


@dataclass
class _Connection:
    sent: bytearray = field(default_factory=bytearray)
    received: bytearray = field(default_factory=bytearray)

    def exchanges(self) -> Iterator[Exchange]:
        answers = _split_answers(bytes(self.received))
        for index, (method, path, headers, body) in enumerate(_requests(bytes(self.sent))):
            status, answer = answers[index] if index < len(answers) else (None, b"")
            yield Exchange(method, path, headers, body, status, answer)


def _requests(data: bytes) -> Iterator[tuple[str, str, dict[str, str], Any]]:
    while data:
        head, found, rest = data.partition(b"\r\n\r\n")
        if not found:
            return
        first, *lines = head.decode("latin-1").split("\r\n")
        method, path, _ = first.split(" ", 2)
        headers = {
            name.strip().lower(): value.strip()
            for name, _, value in (line.partition(":") for line in lines)
        }
        if headers.get("transfer-encoding") == "chunked":
            raw, data = _chunks(rest)
        else:
            length = int(headers.get("content-length", 0))
            raw, data = rest[:length], rest[length:]
        try:
            body = json.loads(raw) if raw else None
        except ValueError:
            body = raw.decode("latin-1")
        yield method, path, headers, body


def _chunks(data: bytes) -> tuple[bytes, bytes]:
    body = b""
    while True:
        size_line, _, data = data.partition(b"\r\n")
        size = int(size_line, 16)
        body, data = body + data[:size], data[size + 2 :]
        if size == 0:
            return body, data


def _split_answers(data: bytes) -> list[tuple[int, bytes]]:
    starts = [match for match in _STATUS.finditer(data) if match[1] != b"100"]
    ends = [match.start() for match in starts[1:]] + [len(data)]
    return [
        (int(match[1]), data[match.start() : end]) for match, end in zip(starts, ends, strict=True)
    ]


class Recorder:
    """Carries connections of a UNIX socket to a port and keeps both directions."""

    def __init__(self, path: Path, port: int) -> None:
        self._port = port
        self._connections: list[_Connection] = []
        self._threads: list[threading.Thread] = []
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen(64)
        self._accepting = threading.Thread(target=self._accept, daemon=True)
        self._accepting.start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                inner, _ = self._listener.accept()
                try:
                    outer = socket.create_connection(("127.0.0.1", self._port))
                except OSError:  # the run has ended
                    inner.close()
                    continue
                kept = _Connection()
                self._connections.append(kept)
                thread = threading.Thread(target=_relay, args=(inner, outer, kept), daemon=True)
                self._threads.append(thread)
                thread.start()

    def exchanges(self) -> list[Exchange]:
        """Return all requests so far, in the order of their connections."""
        return [one for connection in self._connections for one in connection.exchanges()]

    def close(self) -> None:
        """Stop listening, and wait for the ends of the connections."""
        self._listener.shutdown(socket.SHUT_RDWR)
        self._accepting.join(JOIN_SECONDS)
        self._listener.close()
        for thread in self._threads:
            thread.join(JOIN_SECONDS)


def _relay(inner: socket.socket, outer: socket.socket, kept: _Connection) -> None:
    back = threading.Thread(target=_carry, args=(outer, inner, kept.received), daemon=True)
    with inner, outer:
        back.start()
        _carry(inner, outer, kept.sent)
        back.join()


def _carry(source: socket.socket, target: socket.socket, buffer: bytearray) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(65536):
            buffer += data
            target.sendall(data)
    for end in (source, target):
        with contextlib.suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)
