"""Framing, encoding and mutual authentication of the connections between guards and ranks.

A frame is a 4-byte big-endian length and a msgpack document. A TCP connection begins with a
challenge and response in both directions over the run's secret (HMAC-SHA256, fresh nonces, one
label per direction), so that neither a stranger nor a replay becomes a peer. Guards use the same
protocol over asyncio's streams: ``protocol.wire_streams``.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import os
import select
import socket
import struct
from functools import partial
from math import ceil
from typing import Any, Generic, TypeVar

import msgspec

from k2cli.files import decode_with
from k2cli.pauses import Deadline, PauseAwareClock

MAX_FRAME_BYTES = 256 * 2**20
LENGTH = struct.Struct(">I")
NONCE_BYTES = 32
_encoder = msgspec.msgpack.Encoder()
T = TypeVar("T")


class ConnectionLost(Exception):
    """The peer is gone, or sent something that is not part of the protocol."""


class WrongSecret(ConnectionLost):
    """The peer does not know the run's secret."""


def frame(message: Any) -> bytes:
    """Encode one message as a frame."""
    body = _encoder.encode(message)
    return LENGTH.pack(len(body)) + body


def proof(secret: str, role: bytes, theirs: bytes, ours: bytes) -> bytes:
    """Compute the HMAC that proves knowledge of the secret, for the nonces of both sides."""
    return hmac.new(bytes.fromhex(secret), role + theirs + ours, hashlib.sha256).digest()


class Frames(Generic[T]):
    """The messages in a stream of bytes, which comes in pieces.

    Args:
        receives: the union type of the messages.
    """

    def __init__(self, receives: Any) -> None:
        self._decoder: msgspec.msgpack.Decoder[T] = msgspec.msgpack.Decoder(receives)
        self._buffer = bytearray()

    def add(self, chunk: bytes) -> None:
        """Add bytes that have come."""
        self._buffer += chunk

    def take(self) -> T | None:
        """Remove and return the next message, or None if no whole one has come.

        Raises:
            ConnectionLost: if the bytes break the protocol.
        """
        if len(self._buffer) < LENGTH.size:
            return None
        (size,) = LENGTH.unpack_from(self._buffer)
        if size > MAX_FRAME_BYTES:
            raise ConnectionLost(f"a frame of {size} bytes is too long")
        if len(self._buffer) < LENGTH.size + size:
            return None
        body = bytes(self._buffer[LENGTH.size : LENGTH.size + size])
        del self._buffer[: LENGTH.size + size]
        try:
            return decode_with(partial(self._decoder.decode, body))
        except msgspec.MsgspecError as error:
            raise ConnectionLost(f"a message breaks the protocol: {error}") from error


class Channel(Generic[T]):
    """A blocking, framed connection that receives messages of one union type.

    Sending is one ``sendall``, and may be done while another thread receives. Threads that send at
    the same time need a lock.
    """

    def __init__(self, connection: socket.socket, receives: Any) -> None:
        self._socket = connection
        self._frames: Frames[T] = Frames(receives)
        if connection.family in (socket.AF_INET, socket.AF_INET6):
            # macOS refuses it if the peer has closed the connection; the next use will tell.
            with contextlib.suppress(OSError):
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def fileno(self) -> int:
        """Return the descriptor of the socket, for selectors."""
        return self._socket.fileno()

    def send(self, *messages: Any) -> None:
        """Send messages in one write.

        Raises:
            ConnectionLost: if the peer is gone.
        """
        try:
            self._socket.sendall(b"".join(map(frame, messages)))
        except OSError as error:
            raise ConnectionLost(str(error)) from error

    def receive(self, timeout_seconds: float | None = None) -> T | None:
        """Return the next message, or None if no whole message came in time (None: no limit).

        Raises:
            ConnectionLost: if the peer is gone or broke the protocol.
        """
        while (message := self._frames.take()) is None:
            try:
                if timeout_seconds is not None and not self._can_read(timeout_seconds):
                    return None
                chunk = self._socket.recv(2**16)
            except OSError as error:
                raise ConnectionLost(str(error)) from error
            if not chunk:
                raise ConnectionLost("the peer closed the connection")
            self._frames.add(chunk)
        return message

    def _can_read(self, timeout_seconds: float) -> bool:
        """Wait until ``recv`` would return at once; return False if it would not in time.

        A time limit of the socket would also limit what other threads send meanwhile, and a message
        that is cut off in the middle breaks the stream.
        """
        descriptor = self._socket.fileno()
        if descriptor < 0:
            raise ConnectionLost("the connection is closed")
        waiting = select.poll()
        waiting.register(descriptor, select.POLLIN)
        return bool(waiting.poll(ceil(timeout_seconds * 1000)))

    def close(self) -> None:
        """Close the connection. Never raises."""
        self._socket.close()


def _receive_exactly(connection: socket.socket, size: int, limit: Deadline) -> bytes:
    data = b""
    while len(data) < size:
        connection.settimeout(max(limit.next_wait(), 0.001))
        try:
            chunk = connection.recv(size - len(data))
        except TimeoutError:
            if limit.has_passed:
                raise
            continue
        if not chunk:
            raise ConnectionLost("the peer closed the connection while authenticating")
        data += chunk
    return data


def authenticate(
    connection: socket.socket,
    secret: str,
    *,
    accepting: bool,
    timeout_seconds: float = 5.0,
    clock: PauseAwareClock | None = None,
) -> None:
    """Prove knowledge of the run's secret to the peer, and check the proof of the peer.

    Args:
        connection: to the peer.
        secret: of the run, in hex.
        accepting: True for the side that has accepted the connection.
        timeout_seconds: for the whole exchange.
        clock: that of the caller, if it has a time limit of its own.

    Raises:
        WrongSecret: if the peer does not know it.
        ConnectionLost: if it does not answer in time.
    """
    ours = os.urandom(NONCE_BYTES)
    my_role, their_role = (b"accept", b"connect") if accepting else (b"connect", b"accept")
    try:
        connection.settimeout(timeout_seconds)
        limit = Deadline(timeout_seconds, clock)  # of all steps: bytes may come one by one
        connection.sendall(ours)
        theirs = _receive_exactly(connection, NONCE_BYTES, limit)
        connection.sendall(proof(secret, my_role, theirs, ours))
        answer = _receive_exactly(connection, hashlib.sha256().digest_size, limit)
        connection.settimeout(None)
    except OSError as error:
        raise ConnectionLost(f"authentication failed: {error}") from error
    if not hmac.compare_digest(answer, proof(secret, their_role, ours, theirs)):
        raise WrongSecret("the peer does not know the run's secret")
