"""The connection between the leader's guard and the supervisor: JSON lines on stdin and stdout.

ssh carries them from another node. Nothing here ever blocks: if the supervisor does not read, log
lines are dropped and counted, and all other events wait in memory.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from collections.abc import AsyncIterator
from functools import partial

import msgspec

from k2cli.files import decode_with
from k2cli.protocol import LogLine, RunEvent, SupervisorMessage
from k2cli.protocol.wire import ConnectionLost

_MAX_LINE_BYTES = 2**20
_MAX_WAITING_BYTES = 4 * 2**20
_encoder = msgspec.json.Encoder()
_decoder: msgspec.json.Decoder[SupervisorMessage] = msgspec.json.Decoder(SupervisorMessage)


class SupervisorPipe:
    """Messages from the supervisor and events to it. Use ``SupervisorPipe.open`` to make one."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.WriteTransport) -> None:
        self._reader = reader
        self._writer = writer
        self._dropped_lines = 0

    @classmethod
    async def open(cls) -> SupervisorPipe:
        """Take over stdin and stdout of this process.

        Accidental prints go to stderr from now on, so that they cannot split an event.
        """
        loop = asyncio.get_running_loop()
        reader = asyncio.StreamReader(limit=_MAX_LINE_BYTES)
        source = os.fdopen(os.dup(0), "rb", buffering=0)
        target = os.fdopen(os.dup(1), "wb", buffering=0)
        os.dup2(2, 1)
        sys.stdout = sys.stderr
        await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), source)
        writer, _ = await loop.connect_write_pipe(asyncio.BaseProtocol, target)
        # Never pause writing: a supervisor that is slow to read must not stop the guard.
        writer.set_write_buffer_limits(high=2**40)
        return cls(reader, writer)

    def send(self, event: RunEvent) -> None:
        """Queue an event. ``messages`` ends if the supervisor is gone."""
        if self._writer.is_closing():
            return
        if isinstance(event, LogLine) and self._is_full():
            self._dropped_lines += 1
            return
        if self._dropped_lines and isinstance(event, LogLine):
            note = f"[{self._dropped_lines} log lines dropped: the launcher did not keep up]"
            self._dropped_lines = 0
            self._write(LogLine(event.rank, event.node, "guard", note))
        self._write(event)

    def _write(self, event: RunEvent) -> None:
        self._writer.write(_encoder.encode(event) + b"\n")

    def _is_full(self) -> bool:
        return self._writer.get_write_buffer_size() > _MAX_WAITING_BYTES

    async def messages(self) -> AsyncIterator[SupervisorMessage]:
        """Yield the messages of the supervisor until it is gone.

        Raises:
            ConnectionLost: if a line is not a valid message.
        """
        try:
            while line := await self._reader.readline():
                yield decode_with(partial(_decoder.decode, line))
        except (ValueError, msgspec.MsgspecError) as error:
            raise ConnectionLost(f"the launcher broke the protocol: {error}") from error
        except OSError:
            return

    async def flush(self, timeout_seconds: float) -> None:
        """Wait until the supervisor has read all events, or the time is up."""
        loop = asyncio.get_running_loop()
        until = loop.time() + timeout_seconds
        while self._writer.get_write_buffer_size() and not self._writer.is_closing():
            if loop.time() > until:
                return
            await asyncio.sleep(0.02)


async def wait_until_stdin_closes() -> None:
    """Wait until the launcher closes a guard's stdin or is gone; ignore the content."""
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader(limit=_MAX_LINE_BYTES)
    source = os.fdopen(os.dup(0), "rb", buffering=0)
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), source)
    with contextlib.suppress(OSError):  # sshd's end may be a socket, which can be reset
        while await reader.read(_MAX_LINE_BYTES):
            pass
