"""The protocol of ``protocol.wire`` over asyncio's streams, for guards.

It is a separate file because importing asyncio takes 30 ms, and a rank does not need it.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import os
import socket
from typing import Any, Generic

import msgspec

from k2cli.files import decode_with
from k2cli.protocol.wire import (
    LENGTH,
    MAX_FRAME_BYTES,
    NONCE_BYTES,
    ConnectionLost,
    T,
    WrongSecret,
    frame,
    proof,
)


class _KeepingProtocol(asyncio.StreamReaderProtocol):
    """A stream protocol that keeps received data when the connection breaks.

    asyncio drops received but unread data if a *write* fails: a heartbeat to a peer that has just
    exited would lose the peer's last message.
    """

    def __init__(self, reader: asyncio.StreamReader) -> None:
        super().__init__(reader)
        self._kept_reader = reader
        self._descriptor = -1

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the socket, which is still open when ``connection_lost`` is called."""
        self._descriptor = transport.get_extra_info("socket").fileno()
        super().connection_made(transport)

    def connection_lost(self, exc: Exception | None) -> None:
        """Read the remaining data, and report the end of the stream instead of an error."""
        if exc is not None:
            with contextlib.suppress(OSError):
                while chunk := os.read(self._descriptor, 2**16):
                    self._kept_reader.feed_data(chunk)
        super().connection_lost(None)


async def open_stream(
    host: str | None = None, port: int | None = None, *, connection: socket.socket | None = None
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Open a connection like ``asyncio.open_connection``, but never lose received data.

    Raises:
        OSError: if the connection fails.
    """
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader()
    protocol = _KeepingProtocol(reader)
    if connection is not None:
        transport, _ = await loop.create_connection(lambda: protocol, sock=connection)
    else:
        transport, _ = await loop.create_connection(lambda: protocol, host or "", port or 0)
    return reader, asyncio.StreamWriter(transport, protocol, reader, loop)


async def accepted_stream(
    connection: socket.socket,
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Return the streams of an accepted connection, which never lose received data.

    Raises:
        OSError: if the connection is gone.
    """
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader()
    protocol = _KeepingProtocol(reader)
    transport, _ = await loop.connect_accepted_socket(lambda: protocol, connection)
    return reader, asyncio.StreamWriter(transport, protocol, reader, loop)


class AsyncChannel(Generic[T]):
    """A framed connection over asyncio's streams that receives messages of one union type."""

    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, receives: Any
    ) -> None:
        self._reader = reader
        self._writer = writer
        self._decoder: msgspec.msgpack.Decoder[T] = msgspec.msgpack.Decoder(receives)

    def send(self, message: Any) -> None:
        """Queue one message. The next ``receive`` raises if the peer is lost."""
        if not self._writer.is_closing():
            self._writer.write(frame(message))

    async def receive(self) -> T:
        """Return the next message.

        Raises:
            ConnectionLost: if the peer is gone or broke the protocol.
        """
        try:
            (size,) = LENGTH.unpack(await self._reader.readexactly(LENGTH.size))
            if size > MAX_FRAME_BYTES:
                raise ConnectionLost(f"a frame of {size} bytes is too long")
            return decode_with(self._decoder, await self._reader.readexactly(size))
        except (OSError, asyncio.IncompleteReadError) as error:
            raise ConnectionLost("the peer closed the connection") from error
        except msgspec.MsgspecError as error:
            raise ConnectionLost(f"a message breaks the protocol: {error}") from error

    def close(self) -> None:
        """Close the connection. Never raises."""
        self._writer.close()


async def authenticate_stream(
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
    secret: str,
    *,
    accepting: bool,
    timeout_seconds: float = 5.0,
) -> None:
    """Prove knowledge of the run's secret to the peer, and check the proof of the peer.

    Raises:
        WrongSecret: if the peer does not know the secret.
        ConnectionLost: if it does not answer in time.
    """
    ours = os.urandom(NONCE_BYTES)
    my_role, their_role = (b"accept", b"connect") if accepting else (b"connect", b"accept")
    try:
        async with asyncio.timeout(timeout_seconds):
            writer.write(ours)
            theirs = await reader.readexactly(NONCE_BYTES)
            writer.write(proof(secret, my_role, theirs, ours))
            answer = await reader.readexactly(hashlib.sha256().digest_size)
    except (OSError, TimeoutError, asyncio.IncompleteReadError) as error:
        raise ConnectionLost(f"authentication failed: {error}") from error
    if not hmac.compare_digest(answer, proof(secret, their_role, ours, theirs)):
        raise WrongSecret("the peer does not know the run's secret")
