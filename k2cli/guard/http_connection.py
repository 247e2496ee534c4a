"""Limits of an HTTP connection: how many there may be, and how long a client may take to ask.

uvicorn bounds neither. Without these limits, idle or half-sent connections use up the guard's
files, and the run ends although nobody meant it any harm.
"""

from __future__ import annotations

import asyncio
import ssl
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

HANDSHAKE_SECONDS = 15.0
"""From the first byte of a TLS connection to the end of the handshake."""

HEADER_SECONDS = 15.0
"""From the first byte of a connection, or the end of the response before, to the whole header."""

BODY_SECONDS = 60.0
"""From the header to the end of the body: 32 MiB take 3 s over a network of 100 Mbit/s."""

PROBE_SECONDS = 5.0
"""Between two probes of a client that has closed its sending side."""

MAX_CONNECTIONS = 1024
BACKLOG = 16
"""Connections that asyncio accepts in one turn of its loop; more may wait in the kernel."""

# A connection that is refused is closed three turns after it was accepted.
RESERVED_FILES = 96 + 4 * BACKLOG
"""Files that connections of clients never use: the guard's own pipes, sockets, logs and modules."""

_PROBE = b"HTTP/1.1 100 Continue\r\n\r\n"
_BUSY = (
    b"HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\nRetry-After: 5\r\n"
    b"Connection: close\r\n\r\n"
    b'{"error": {"message": "too many connections are open; try again later", '
    b'"type": "server_error", "param": null, "code": "too_many_connections"}}\n'
)


class IdleConnection(Protocol):
    """A connection that may be closed to make room for another one."""

    address: str | None
    transport: asyncio.Transport


@dataclass(slots=True)
class ConnectionLimits:
    """Limits of open connections, in total and from one address that is not loopback.

    ``idle`` are those without a request in progress, the oldest first: they make room for new ones.
    """

    total: int
    per_address: int
    addresses: Counter[str] = field(default_factory=Counter)
    idle: dict[IdleConnection, None] = field(default_factory=dict)

    @classmethod
    def for_files(cls, file_limit: int) -> ConnectionLimits:
        """Leave enough files for the guard itself."""
        total = max(8, min(MAX_CONNECTIONS, file_limit - RESERVED_FILES))
        return cls(total, max(4, total // 2))

    def make_room(self, address: str) -> bool:
        """Close an idle connection if that is needed for one more from this address.

        Returns:
            False if there is no room, because requests are in progress on all connections.
        """
        loopback = address.startswith("127.") or address in ("::1", "")
        if not loopback and self.addresses[address] >= self.per_address:
            candidates = [each for each in self.idle if each.address == address]
        elif self.addresses.total() >= self.total:
            candidates = list(self.idle)
        else:
            return True
        oldest = next(iter(candidates), None)
        if oldest is not None:
            del self.idle[oldest]
            oldest.transport.abort()
        return oldest is not None

    def enter(self, connection: IdleConnection, address: str) -> bool:
        """Count a new connection; return False if there is no room for it."""
        if not self.make_room(address):
            return False
        connection.address = address
        self.addresses[address] += 1
        self.idle[connection] = None
        return True

    def leave(self, connection: IdleConnection) -> None:
        """Take back ``enter``. Idempotent."""
        self.idle.pop(connection, None)
        if connection.address is not None:
            self.addresses[connection.address] -= 1
            self.addresses += Counter()  # forget addresses without connections
            connection.address = None


def _address_of(transport: asyncio.BaseTransport) -> str:
    peer = transport.get_extra_info("peername")
    return str(peer[0]) if isinstance(peer, tuple) and peer else ""


class LimitedConnection(H11Protocol):
    """uvicorn's HTTP/1.1 connection with these limits and deadlines."""

    def __init__(self, limits: ConnectionLimits, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.address: str | None = None
        """The client's, once the connection is admitted."""
        self._limits = limits
        self._deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if not self._limits.enter(self, _address_of(transport)):
            transport.write(_BUSY)
            transport.close()
            return
        self._allow(HEADER_SECONDS)

    def connection_lost(self, exc: Exception | None) -> None:
        self._allow(None)
        self._limits.leave(self)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        before = self.cycle
        super().data_received(data)
        self._watch(before)

    def _watch(self, before: Any) -> None:
        cycle = self.cycle
        if cycle is None or cycle.response_complete:
            return  # a header is still coming in: its deadline holds
        self._limits.idle.pop(self, None)
        if not cycle.more_body:
            self._allow(None)
        elif cycle is not before:
            self._allow(BODY_SECONDS)

    def on_response_complete(self) -> None:
        before = self.cycle
        self._limits.idle[self] = None
        self._allow(HEADER_SECONDS)
        super().on_response_complete()
        if self.cycle is not before:  # a pipelined request, which has begun already
            self._watch(before)

    def eof_received(self) -> bool:  # type: ignore[override]
        """Keep the sending side open while an answer is due.

        A client that has closed both sides looks the same, but resets the connection when
        something is sent to it: an interim response is, again and again, until one has begun.
        Over TLS asyncio closes both sides at once.
        """
        cycle = self.cycle
        if self.scheme == "https" or cycle is None or cycle.response_complete or cycle.more_body:
            return False
        cycle.keep_alive = False
        self._probe()
        return True

    def _probe(self) -> None:
        cycle = self.cycle
        if self.transport.is_closing() or cycle.response_complete:
            return
        if not cycle.response_started and self.conn.their_http_version == b"1.1":
            self.transport.write(_PROBE)
        self._deadline = self.loop.call_later(PROBE_SECONDS, self._probe)

    def _allow(self, seconds: float | None) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
        self._deadline = None if seconds is None else self.loop.call_later(seconds, self._expire)

    def _expire(self) -> None:
        self._deadline = None
        if self.transport.is_closing():
            return
        cycle = self.cycle
        if cycle is not None and not cycle.response_complete:
            self.transport.abort()  # in the middle of a body: there is nobody to answer
        elif self.conn.our_state is h11.IDLE and self.conn.trailing_data[0]:
            self.transport.write(b"HTTP/1.1 408 Request Timeout\r\nConnection: close\r\n\r\n")
            self.transport.close()
        else:
            self.transport.close()


class TlsConnection(asyncio.Protocol):
    """A connection until its TLS handshake is done; a ``LimitedConnection`` then takes it over.

    asyncio's own servers tell nobody of a connection before its handshake is done, so strangers
    who never begin one would use up the guard's files.

    Args:
        context: returns the context to use, which may be renewed.
        make_http: makes the connection that speaks HTTP.
    """

    def __init__(
        self,
        context: Callable[[], ssl.SSLContext],
        limits: ConnectionLimits,
        make_http: Callable[[], asyncio.Protocol],
    ) -> None:
        self.address: str | None = None
        self.transport: asyncio.Transport
        self._context = context
        self._limits = limits
        self._make_http = make_http
        self._handshake: asyncio.Task[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        if self._limits.enter(self, _address_of(transport)):
            self._handshake = asyncio.get_running_loop().create_task(self._shake_hands())
        else:
            transport.abort()

    async def _shake_hands(self) -> None:
        early, loop = _EarlyData(), asyncio.get_running_loop()
        try:
            encrypted = await loop.start_tls(
                self.transport,
                early,
                self._context(),
                server_side=True,
                ssl_handshake_timeout=HANDSHAKE_SECONDS,
            )
        except OSError:  # a stranger, or a client that does not trust the certificate
            self.transport.abort()
            return
        finally:
            self._limits.leave(self)
        if encrypted is not None and not early.is_over:
            http = self._make_http()
            encrypted.set_protocol(http)
            http.connection_made(encrypted)
            if early.data:
                http.data_received(bytes(early.data))


class _EarlyData(asyncio.Protocol):
    """Receiver of what comes with the last message of a handshake, before HTTP takes over."""

    def __init__(self) -> None:
        self.data = bytearray()
        self.is_over = False

    def data_received(self, data: bytes) -> None:
        self.data += data

    def eof_received(self) -> None:
        self.is_over = True

    def connection_lost(self, exc: Exception | None) -> None:
        self.is_over = True
