"""Framing, encoding and mutual authentication of the connections between guards and ranks.

A frame is a 4-byte big-endian length and a msgpack document. A TCP connection begins with a
challenge and response in both directions over the run's secret (HMAC-SHA256, fresh nonces, one
label per direction), so that neither a stranger nor a replay becomes a peer.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import os
import socket
import struct
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import msgspec

MAX_FRAME_BYTES = 256 * 2**20
_LENGTH = struct.Struct(">I")
_NONCE_BYTES = 32
_encoder = msgspec.msgpack.Encoder()
T = TypeVar("T")


class ConnectionLost(Exception):
    """The peer is gone, or sent something that is not part of the protocol."""


def frame(message: Any) -> bytes:
    """One message as bytes on the wire."""
    body = _encoder.encode(message)
    return _LENGTH.pack(len(body)) + body


def _proof(secret: str, role: bytes, theirs: bytes, ours: bytes) -> bytes:
    return hmac.new(bytes.fromhex(secret), role + theirs + ours, hashlib.sha256).digest()


class Channel(Generic[T]):
    """A blocking, framed connection that receives messages of one union type.

    Sending is one ``sendall``; two threads must not send at once without a lock of their own.
    """

    def __init__(self, connection: socket.socket, receives: Any) -> None:
        self._socket = connection
        self._decoder: msgspec.msgpack.Decoder[T] = msgspec.msgpack.Decoder(receives)
        self._buffer = bytearray()
        if connection.family in (socket.AF_INET, socket.AF_INET6):
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def fileno(self) -> int:
        """For selectors."""
        return self._socket.fileno()

    def send(self, message: Any) -> None:
        """Send one message.

        Raises:
            ConnectionLost: if the peer is gone.
        """
        try:
            self._socket.sendall(frame(message))
        except OSError as error:
            raise ConnectionLost(str(error)) from error

    def receive(self, timeout_seconds: float | None = None) -> T | None:
        """The next message, or None if none came whole within the time (None: wait for ever).

        Raises:
            ConnectionLost: if the peer is gone or broke the protocol.
        """
        while (message := self._take()) is None:
            try:
                self._socket.settimeout(timeout_seconds)
                chunk = self._socket.recv(2**16)
            except TimeoutError:
                return None
            except OSError as error:
                raise ConnectionLost(str(error)) from error
            finally:
                # The timeout is the socket's, and would otherwise bind the next send.
                if self._socket.fileno() >= 0:
                    self._socket.settimeout(None)
            if not chunk:
                raise ConnectionLost("the peer closed the connection")
            self._buffer += chunk
        return message

    def _take(self) -> T | None:
        if len(self._buffer) < _LENGTH.size:
            return None
        (size,) = _LENGTH.unpack_from(self._buffer)
        if size > MAX_FRAME_BYTES:
            raise ConnectionLost(f"a frame of {size} bytes is too long")
        if len(self._buffer) < _LENGTH.size + size:
            return None
        body = bytes(self._buffer[_LENGTH.size : _LENGTH.size + size])
        del self._buffer[: _LENGTH.size + size]
        try:
            return self._decoder.decode(body)
        except msgspec.MsgspecError as error:
            raise ConnectionLost(f"a message breaks the protocol: {error}") from error

    def close(self) -> None:
        """Close the connection; never raises."""
        self._socket.close()


def _receive_exactly(connection: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        chunk = connection.recv(size - len(data))
        if not chunk:
            raise ConnectionLost("the peer closed the connection while authenticating")
        data += chunk
    return data


def authenticate(
    connection: socket.socket, secret: str, *, accepting: bool, timeout_seconds: float = 5.0
) -> None:
    """Prove to each other that both sides know the run's secret.

    Raises:
        ConnectionLost: if the peer does not know it, or does not answer in time.
    """
    ours = os.urandom(_NONCE_BYTES)
    my_role, their_role = (b"accept", b"connect") if accepting else (b"connect", b"accept")
    try:
        connection.settimeout(timeout_seconds)
        connection.sendall(ours)
        theirs = _receive_exactly(connection, _NONCE_BYTES)
        connection.sendall(_proof(secret, my_role, theirs, ours))
        answer = _receive_exactly(connection, hashlib.sha256().digest_size)
        connection.settimeout(None)
    except OSError as error:
        raise ConnectionLost(f"authentication failed: {error}") from error
    if not hmac.compare_digest(answer, _proof(secret, their_role, ours, theirs)):
        raise ConnectionLost("the peer does not know the run's secret")


class _KeepingProtocol(asyncio.StreamReaderProtocol):
    """A stream whose reader gets all that the peer has sent, whatever became of the connection.

    asyncio drops what has arrived and is not read yet if a *write* fails: a heartbeat to a peer
    that has just exited would take the peer's last message with it.
    """

    def __init__(
        self, reader: asyncio.StreamReader, connected: Callable[..., None] | None = None
    ) -> None:
        super().__init__(reader, connected)
        self._kept_reader = reader
        self._descriptor = -1

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Remember the socket, which is still open when ``connection_lost`` is called."""
        self._descriptor = transport.get_extra_info("socket").fileno()
        super().connection_made(transport)

    def connection_lost(self, exc: Exception | None) -> None:
        """Read what is left; then it is the end of the stream, and not an error."""
        if exc is not None:
            with contextlib.suppress(OSError):
                while chunk := os.read(self._descriptor, 2**16):
                    self._kept_reader.feed_data(chunk)
        super().connection_lost(None)


async def open_stream(
    host: str | None = None, port: int | None = None, *, connection: socket.socket | None = None
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """``asyncio.open_connection``, but nothing that the peer has sent is lost.

    Raises:
        OSError: if there is no connection.
    """
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader()
    protocol = _KeepingProtocol(reader)
    if connection is not None:
        transport, _ = await loop.create_connection(lambda: protocol, sock=connection)
    else:
        transport, _ = await loop.create_connection(lambda: protocol, host or "", port or 0)
    return reader, asyncio.StreamWriter(transport, protocol, reader, loop)


async def serve_stream(
    accept: Callable[[asyncio.StreamReader, asyncio.StreamWriter], None], host: str, port: int
) -> asyncio.Server:
    """``asyncio.start_server`` with the same promise.

    Raises:
        OSError: if the port is taken.
    """
    loop = asyncio.get_running_loop()
    return await loop.create_server(
        lambda: _KeepingProtocol(asyncio.StreamReader(), accept), host, port
    )


class AsyncChannel(Generic[T]):
    """The same over asyncio streams, for guards."""

    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, receives: Any
    ) -> None:
        self._reader = reader
        self._writer = writer
        self._decoder: msgspec.msgpack.Decoder[T] = msgspec.msgpack.Decoder(receives)

    def send(self, message: Any) -> None:
        """Queue one message for sending; a lost peer shows at the next ``receive``."""
        if not self._writer.is_closing():
            self._writer.write(frame(message))

    async def receive(self) -> T:
        """The next message.

        Raises:
            ConnectionLost: if the peer is gone or broke the protocol.
        """
        try:
            (size,) = _LENGTH.unpack(await self._reader.readexactly(_LENGTH.size))
            if size > MAX_FRAME_BYTES:
                raise ConnectionLost(f"a frame of {size} bytes is too long")
            return self._decoder.decode(await self._reader.readexactly(size))
        except (OSError, asyncio.IncompleteReadError) as error:
            raise ConnectionLost("the peer closed the connection") from error
        except msgspec.MsgspecError as error:
            raise ConnectionLost(f"a message breaks the protocol: {error}") from error

    def close(self) -> None:
        """Close the connection; never raises."""
        self._writer.close()


async def authenticate_stream(
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
    secret: str,
    *,
    accepting: bool,
    timeout_seconds: float = 5.0,
) -> None:
    """``authenticate`` over asyncio streams.

    Raises:
        ConnectionLost: if the peer does not know the secret, or does not answer in time.
    """
    ours = os.urandom(_NONCE_BYTES)
    my_role, their_role = (b"accept", b"connect") if accepting else (b"connect", b"accept")
    try:
        async with asyncio.timeout(timeout_seconds):
            writer.write(ours)
            theirs = await reader.readexactly(_NONCE_BYTES)
            writer.write(_proof(secret, my_role, theirs, ours))
            answer = await reader.readexactly(hashlib.sha256().digest_size)
    except (OSError, TimeoutError, asyncio.IncompleteReadError) as error:
        raise ConnectionLost(f"authentication failed: {error}") from error
    if not hmac.compare_digest(answer, _proof(secret, their_role, ours, theirs)):
        raise ConnectionLost("the peer does not know the run's secret")
