"""The guard's side of reading requests: two reader processes, a time limit, and a limit on waiting.

Short requests have a process of their own, so that they never wait behind a long one. A process
that needs longer than the limit is killed, and the next request gets a new one.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import Sequence
from typing import Protocol

import msgspec

from k2cli.protocol.wire import LENGTH, frame
from k2cli.server.engine_request import ServerTokenizer
from k2cli.server.errors import ApiError, invalid
from k2cli.server.read_request import (
    ReaderSettings,
    ReadRequest,
    RequestKind,
    UnreadRequest,
    read_request,
)
from k2cli.server.served_model import ServedModel
from k2cli.units import KIB

LONG_REQUEST_BYTES = 64 * KIB
"""A longer body goes to the process for long requests."""

SHORT_SECONDS = 20.0
LONG_SECONDS = 60.0
START_SECONDS = 60.0
"""Limits of reading a short request, a long one, and of starting (K2's tokenizer takes 2 s)."""

MAX_SHORT_WAITING, MAX_LONG_WAITING = 1024, 16
"""Requests that may wait for their process; further ones are refused with 429."""


class RequestReader(Protocol):
    """Turns a request body into what the engine is asked."""

    async def read(self, kind: RequestKind, body: bytes) -> ReadRequest:
        """Read a request.

        Raises:
            ApiError: if the request is wrong, or cannot be read in time.
        """
        ...

    async def start(self) -> None:
        """Prepare for the first request."""
        ...

    async def close(self) -> None:
        """End what was started."""
        ...


def _accepted(read: ReadRequest) -> ReadRequest:
    refused = read.refusal
    if refused is not None:
        raise ApiError(
            refused.status,
            refused.message,
            kind=refused.kind,
            param=refused.param,
            code=refused.code,
        )
    return read


class InlineReader:
    """Reads requests in a thread of this process, for tests of the server alone."""

    def __init__(self, tokenizer: ServerTokenizer, served: ServedModel) -> None:
        self._tokenizer = tokenizer
        self._served = served

    async def read(self, kind: RequestKind, body: bytes) -> ReadRequest:
        """Read a request in a thread."""
        unread = UnreadRequest(kind, body)
        return _accepted(
            await asyncio.to_thread(read_request, unread, self._tokenizer, self._served)
        )

    async def start(self) -> None:
        """Do nothing."""

    async def close(self) -> None:
        """Do nothing."""


class _Broken(Exception):
    """The process ended or took too long."""


class ReaderProcess:
    """One reader process, started when it is needed and again after it was killed."""

    def __init__(
        self,
        settings: ReaderSettings,
        arguments: Sequence[str],
        seconds: float,
        max_waiting: int,
    ) -> None:
        self._settings = settings
        self._arguments = arguments
        self._seconds = seconds
        self._max_waiting = max_waiting
        self._process: asyncio.subprocess.Process | None = None
        self._turn = asyncio.Lock()
        self._waiting = 0

    async def read(self, unread: UnreadRequest) -> ReadRequest:
        """Read one request after those that came before it.

        Raises:
            ApiError: 429 if too many wait; 400 if this one takes too long or breaks the process.
        """
        if self._waiting >= self._max_waiting:
            raise ApiError(
                429,
                f"{self._waiting} requests are waiting to be read; try again",
                kind="rate_limit_error",
                code="over_capacity",
                headers={"Retry-After": "10"},
            )
        self._waiting += 1
        try:
            async with self._turn:
                return await self._ask(unread)
        finally:
            self._waiting -= 1

    async def _ask(self, unread: UnreadRequest) -> ReadRequest:
        done = False
        try:
            if self._process is None or self._process.returncode is not None:
                await asyncio.wait_for(self.start(), START_SECONDS)
            answer = await asyncio.wait_for(self._exchange(unread), self._seconds)
            done = True
        except (TimeoutError, _Broken, OSError) as error:
            why = (
                f"took longer than {self._seconds:.0f} s"
                if isinstance(error, TimeoutError)
                else "failed"
            )
            raise invalid(f"reading the request {why}", "messages", "unreadable_request") from error
        finally:
            if not done:  # also when the client has gone: what it reads is nobody's any more
                await self.close()
        return msgspec.msgpack.decode(answer, type=ReadRequest)

    async def start(self) -> None:
        """Start the process, which loads the tokenizer before it reads its first request."""
        self._process = await asyncio.create_subprocess_exec(
            *self._arguments,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            start_new_session=True,
        )
        assert self._process.stdin is not None
        self._process.stdin.write(frame(self._settings))
        await self._process.stdin.drain()

    async def _exchange(self, unread: UnreadRequest) -> bytes:
        process = self._process
        assert process is not None
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(frame(unread))
        await process.stdin.drain()
        try:
            (size,) = LENGTH.unpack(await process.stdout.readexactly(LENGTH.size))
            return await process.stdout.readexactly(size)
        except asyncio.IncompleteReadError as error:
            raise _Broken from error

    async def close(self) -> None:
        """Kill the process, if there is one."""
        process, self._process = self._process, None
        if process is None:
            return
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGKILL)
        await process.wait()


class ProcessReader:
    """Reads short and long requests in two processes.

    Args:
        settings: the model that is served.
        marks: arguments by which the processes are known as the run's.
    """

    def __init__(self, settings: ReaderSettings, marks: Sequence[str]) -> None:
        arguments = [sys.executable, "-P", "-m", "k2cli.guard.reader_process", *marks]
        self._short = ReaderProcess(settings, arguments, SHORT_SECONDS, MAX_SHORT_WAITING)
        self._long = ReaderProcess(settings, arguments, LONG_SECONDS, MAX_LONG_WAITING)

    async def read(self, kind: RequestKind, body: bytes) -> ReadRequest:
        """Read a request in the process for its length."""
        reader = self._long if len(body) > LONG_REQUEST_BYTES else self._short
        return _accepted(await reader.read(UnreadRequest(kind, body)))

    async def start(self) -> None:
        """Start the process for short requests, which loads its tokenizer in the background."""
        await self._short.start()

    async def close(self) -> None:
        """Kill both processes."""
        await asyncio.gather(self._short.close(), self._long.close())
