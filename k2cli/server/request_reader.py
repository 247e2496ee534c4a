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

from k2cli.protocol.wire import LENGTH, MAX_FRAME_BYTES, frame
from k2cli.server.errors import ApiError, unavailable
from k2cli.server.read_request import (
    ReaderSettings,
    ReadRequest,
    RequestKind,
    UnreadRequest,
    accepted,
)
from k2cli.units import KIB

LONG_REQUEST_BYTES = 64 * KIB
"""A longer body goes to the process for long requests."""

SHORT_SECONDS = 20.0
LONG_SECONDS = 60.0
"""Limits of reading a short request and a long one, with the start of the process (K2's: 2 s)."""

_UNREADABLE = "unreadable_request"
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


class _Ended(Exception):
    """The process ended, or did not keep to the protocol."""


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
        """Ask the process, and once more a new one if it ended: the request may be innocent."""
        with contextlib.suppress(_Ended):
            return await self._try(unread)
        with contextlib.suppress(_Ended):
            return await self._try(unread)
        raise ApiError(400, "the process that reads requests ends with this one", code=_UNREADABLE)

    async def _try(self, unread: UnreadRequest) -> ReadRequest:
        done = False
        try:
            if self._process is None or self._process.returncode is not None:
                await self.start()
            answer = await asyncio.wait_for(self._exchange(unread), self._seconds)
            done = True
        except TimeoutError as error:
            message = f"reading the request took longer than {self._seconds:.0f} s"
            raise ApiError(400, message, code=_UNREADABLE) from error
        finally:
            if not done:  # also when the client has gone: what it reads is nobody's any more
                await self.close()
        return msgspec.msgpack.decode(answer, type=ReadRequest)

    async def start(self) -> None:
        """Start the process, which loads the tokenizer before it reads its first request.

        Raises:
            ApiError: 503 if the system does not allow it now.
        """
        try:
            self._process = await asyncio.create_subprocess_exec(
                *self._arguments,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                start_new_session=True,
            )
        except OSError as error:
            raise unavailable(f"requests cannot be read: {error.strerror}") from error
        assert self._process.stdin is not None
        self._process.stdin.write(frame(self._settings))

    async def _exchange(self, unread: UnreadRequest) -> bytes:
        process = self._process
        assert process is not None
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(frame(unread))
            await process.stdin.drain()
            (size,) = LENGTH.unpack(await process.stdout.readexactly(LENGTH.size))
            if size > MAX_FRAME_BYTES:
                raise _Ended
            return await process.stdout.readexactly(size)
        except (asyncio.IncompleteReadError, OSError) as error:
            raise _Ended from error

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
        return accepted(await reader.read(UnreadRequest(kind, body)))

    async def start(self) -> None:
        """Start the process for short requests, which loads its tokenizer in the background."""
        with contextlib.suppress(ApiError):  # the first request tries again
            await self._short.start()

    async def close(self) -> None:
        """Kill both processes."""
        await asyncio.gather(self._short.close(), self._long.close())
