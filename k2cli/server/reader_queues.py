"""The guard's side of reading requests: two reader processes, and limits on time and on waiting.

Short requests have a process of their own, so that they never wait behind a long one. A process
that exceeds its limits is killed, and the next request gets a new one.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import Protocol

import msgspec

from k2cli.errors import K2Error
from k2cli.files import decode_with
from k2cli.server.errors import ApiError, unavailable
from k2cli.server.killable_reader import KillableReader, ProcessEnded, ProcessTooLarge
from k2cli.server.read_request import ReadRequest, RequestKind, UnreadRequest, accepted
from k2cli.units import KIB, format_bytes

LONG_REQUEST_BYTES = 64 * KIB
"""A longer body goes to the process for long requests."""

SHORT_SECONDS = 20.0
LONG_SECONDS = 60.0
"""Limits of reading a short request and a long one."""

MAX_SHORT_WAITING, MAX_LONG_WAITING = 1024, 16
"""Requests that may wait for their process; further ones are refused with 429."""

_UNREADABLE = "unreadable_request"
_ANY_REQUEST = UnreadRequest("tokenize", b'{"prompt": "k2"}')
_logger = logging.getLogger(__name__)


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


class _Queue:
    """The requests for one process, which reads them one after another."""

    def __init__(self, process: KillableReader, seconds: float, max_waiting: int) -> None:
        self.process = process
        self._seconds = seconds
        self._max_waiting = max_waiting
        self._turn = asyncio.Lock()
        self._waiting = 0

    async def read(self, unread: UnreadRequest) -> ReadRequest:
        """Read one request after those that came before it.

        Raises:
            ApiError: 429 if too many wait; 400 if this one exceeds a limit or breaks the process;
                503 if no process can be started.
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
        with contextlib.suppress(ProcessEnded):
            return await self._try(unread)
        with contextlib.suppress(ProcessEnded):
            return await self._try(unread)
        raise ApiError(400, "the process that reads requests ends with this one", code=_UNREADABLE)

    async def _try(self, unread: UnreadRequest) -> ReadRequest:
        done = False
        try:
            await self.process.load()
            answer = await self.process.ask(unread, self._seconds)
            read = decode_with(lambda: msgspec.msgpack.decode(answer, type=ReadRequest))
            done = True
        except K2Error as error:
            _logger.error("%s", error.message)
            raise unavailable("requests cannot be read now; the log has the reason") from error
        except TimeoutError as error:
            message = f"reading the request took longer than {self._seconds:.0f} s"
            raise ApiError(400, message, code=_UNREADABLE) from error
        except ProcessTooLarge as error:
            limit = format_bytes(self.process.memory_bytes)
            message = f"reading the request takes more than {limit} of memory"
            raise ApiError(400, message, code=_UNREADABLE) from error
        except msgspec.MsgspecError as error:
            raise ProcessEnded from error
        finally:
            if not done:  # also when the client has gone: what it reads is nobody's any more
                await self.process.close()
        return read


class ProcessReader:
    """Reads short and long requests in two processes.

    Args:
        short: the process for short requests, which may have been started.
        long: that for long ones, which is started when one comes.
    """

    def __init__(self, short: KillableReader, long: KillableReader) -> None:
        self._short = _Queue(short, SHORT_SECONDS, MAX_SHORT_WAITING)
        self._long = _Queue(long, LONG_SECONDS, MAX_LONG_WAITING)

    async def read(self, kind: RequestKind, body: bytes) -> ReadRequest:
        """Read a request in the process for its length."""
        queue = self._long if len(body) > LONG_REQUEST_BYTES else self._short
        return accepted(await queue.read(UnreadRequest(kind, body)))

    async def start(self) -> None:
        """Start the process for short requests, which loads its tokenizer in the background."""
        with contextlib.suppress(K2Error):  # the first request tries again
            await self._short.process.start()

    async def check(self) -> None:
        """Read a request that every model takes: a run is not ready before requests can be read.

        Raises:
            K2Error: if they cannot.
        """
        try:
            await self._short.read(_ANY_REQUEST)
        except ApiError as error:
            raise K2Error(f"requests cannot be read: {error.message}") from error

    async def close(self) -> None:
        """Kill both processes."""
        await asyncio.gather(self._short.process.close(), self._long.process.close())
