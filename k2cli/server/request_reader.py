"""The guard's side of reading requests: two reader processes, limits, and the check at the launch.

Short requests have a process of their own, so that they never wait behind a long one. A process
that exceeds a limit of time or memory is killed, and the next request gets a new one. The first
process also tries the model's tokenizer and chat templates, before the run is ready.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import sys
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, TypeVar

import msgspec

from k2cli.errors import K2Error
from k2cli.files import decode_with
from k2cli.protocol.wire import LENGTH, MAX_FRAME_BYTES, frame
from k2cli.server.errors import ApiError, unavailable
from k2cli.server.read_request import (
    MEMORY_BYTES,
    KnownTemplates,
    Loaded,
    NotLoaded,
    ReaderNews,
    ReaderSettings,
    ReadRequest,
    RequestKind,
    Trying,
    UnreadRequest,
    accepted,
)
from k2cli.units import KIB, format_bytes

LONG_REQUEST_BYTES = 64 * KIB
"""A longer body goes to the process for long requests."""

SHORT_SECONDS = 20.0
LONG_SECONDS = 60.0
"""Limits of reading a short request and a long one."""

LOAD_SECONDS = 60.0
"""Limit of starting a process, and of reading the tokenizer's file (K2's: 2 s)."""

TRY_SECONDS = 10.0
"""Limit of each trial at the launch: of encoding, compiling and rendering (K2's: 0.1 s)."""

MAX_SHORT_WAITING, MAX_LONG_WAITING = 1024, 16
"""Requests that may wait for their process; further ones are refused with 429."""

_UNREADABLE = "unreadable_request"
_LOOK_SECONDS = 0.2
_STARTING = Trying("", "reading")
_news: msgspec.msgpack.Decoder[ReaderNews] = msgspec.msgpack.Decoder(ReaderNews)
_logger = logging.getLogger(__name__)
_T = TypeVar("_T")


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


class _TooLarge(Exception):
    """The process has more memory than it may have."""


class _Unusable(K2Error):
    """A file of the model cannot be used, or no process can be started."""


@dataclass(slots=True)
class _Shared:
    """What the processes of one model have in common; the first one to load finds the templates."""

    settings: ReaderSettings
    templates: KnownTemplates | None = None


class ReaderProcess:
    """One reader process, started when it is needed and again after it was killed."""

    def __init__(
        self, shared: _Shared, arguments: Sequence[str], seconds: float, max_waiting: int
    ) -> None:
        self._shared = shared
        self._arguments = arguments
        self._seconds = seconds
        self._max_waiting = max_waiting
        self._process: asyncio.subprocess.Process | None = None
        self._loaded = False
        self._turn = asyncio.Lock()
        self._waiting = 0

    async def read(self, unread: UnreadRequest) -> ReadRequest:
        """Read one request after those that came before it.

        Raises:
            ApiError: 429 if too many wait; 400 if this one takes too long or breaks the process;
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

    async def prepare(self) -> None:
        """Start the process and wait until it has loaded, and tried, the model's files.

        Raises:
            K2Error: if a file cannot be used; the message names it.
        """
        async with self._turn:
            await self._load()

    async def start(self) -> None:
        """Start the process if it does not run; it loads before it reads its first request.

        Raises:
            K2Error: if the system does not allow it now.
        """
        if self._process is not None and self._process.returncode is None:
            return
        try:
            self._process = await asyncio.create_subprocess_exec(
                *self._arguments,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                start_new_session=True,
            )
        except OSError as error:
            raise _Unusable(f"requests cannot be read: {error.strerror}") from error
        self._loaded = False
        settings = msgspec.structs.replace(self._shared.settings, templates=self._shared.templates)
        assert self._process.stdin is not None
        self._process.stdin.write(frame(settings))

    async def close(self) -> None:
        """Kill the process, if there is one."""
        process, self._process = self._process, None
        if process is None:
            return
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGKILL)
        await process.wait()

    # --- one request ----------------------------------------------------------------------------

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
            await self._load()
            answer = await self._within(self._seconds, self._exchange(unread))
            read = decode_with(lambda: msgspec.msgpack.decode(answer, type=ReadRequest))
            done = True
        except _Unusable as error:
            _logger.error("%s", error.message)
            raise unavailable("requests cannot be read now; the log has the reason") from error
        except TimeoutError as error:
            message = f"reading the request took longer than {self._seconds:.0f} s"
            raise ApiError(400, message, code=_UNREADABLE) from error
        except _TooLarge as error:
            message = f"reading the request takes more than {format_bytes(MEMORY_BYTES)}"
            raise ApiError(400, message, code=_UNREADABLE) from error
        except msgspec.MsgspecError as error:
            raise _Ended from error
        finally:
            if not done:  # also when the client has gone: what it reads is nobody's any more
                await self.close()
        return read

    async def _exchange(self, unread: UnreadRequest) -> bytes:
        process = self._process
        assert process is not None
        assert process.stdin is not None
        try:
            process.stdin.write(frame(unread))
            await process.stdin.drain()
        except OSError as error:
            raise _Ended from error
        return await self._receive()

    async def _receive(self) -> bytes:
        process = self._process
        assert process is not None
        assert process.stdout is not None
        try:
            (size,) = LENGTH.unpack(await process.stdout.readexactly(LENGTH.size))
            if size > MAX_FRAME_BYTES:
                raise _Ended
            return await process.stdout.readexactly(size)
        except (asyncio.IncompleteReadError, OSError) as error:
            raise _Ended from error

    async def _within(self, seconds: float, work: Coroutine[Any, Any, _T]) -> _T:
        """Wait for the process, but only while it keeps to its limits of time and memory.

        Raises:
            TimeoutError, _TooLarge: if it does not.
            _Ended: if it ends.
        """
        working = asyncio.ensure_future(work)
        watching = asyncio.ensure_future(self._wait_until_too_large())
        both: list[asyncio.Future[Any]] = [working, watching]
        try:
            await asyncio.wait(both, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
            if working.done():
                return working.result()
            raise _TooLarge if watching.done() else TimeoutError
        finally:
            for each in both:
                each.cancel()
            await asyncio.gather(*both, return_exceptions=True)

    async def _wait_until_too_large(self) -> None:
        import psutil

        assert self._process is not None
        while True:
            await asyncio.sleep(_LOOK_SECONDS)
            with contextlib.suppress(psutil.Error):
                if psutil.Process(self._process.pid).memory_info().rss > MEMORY_BYTES:
                    return

    # --- loading --------------------------------------------------------------------------------

    async def _load(self) -> None:
        """Start the process if need be, and wait until it takes requests.

        Raises:
            K2Error: if that fails.
        """
        await self.start()
        if self._loaded:
            return
        try:
            with contextlib.suppress(_Ended):
                await self._read_news()
                return
            await self.close()  # something else may have ended it
            await self.start()
            await self._read_news()
        except _Ended as error:
            raise _Unusable(str(error)) from error
        finally:
            if not self._loaded:
                await self.close()

    async def _read_news(self) -> None:
        step = _STARTING
        while not self._loaded:
            limit = LOAD_SECONDS if step.work == "reading" else TRY_SECONDS
            try:
                data = await self._within(limit, self._receive())
                news = decode_with(partial(_news.decode, data))
            except TimeoutError:
                raise _Unusable(_refusal(step, f"takes longer than {limit:.0f} s")) from None
            except _TooLarge:
                raise _Unusable(
                    _refusal(step, f"takes more than {format_bytes(MEMORY_BYTES)}")
                ) from None
            except (_Ended, msgspec.MsgspecError) as error:
                raise _Ended(_refusal(step, "ends the process that does it")) from error
            match news:
                case Trying():
                    step = news
                case NotLoaded(message=message):
                    raise _Unusable(message)
                case Loaded(templates=templates):
                    self._shared.templates = templates
                    self._loaded = True


def _refusal(step: Trying, problem: str) -> str:
    if not step.file:
        return f"requests cannot be read: starting a process for it {problem}"
    return f"{step.file} cannot be used: {step.work} it {problem}"


class ProcessReader:
    """Reads short and long requests in two processes.

    Args:
        settings: the model that is served.
        marks: arguments by which the processes are known as the run's.
    """

    def __init__(self, settings: ReaderSettings, marks: Sequence[str]) -> None:
        arguments = [sys.executable, "-P", "-m", "k2cli.guard.reader_process", *marks]
        shared = _Shared(settings)
        self._short = ReaderProcess(shared, arguments, SHORT_SECONDS, MAX_SHORT_WAITING)
        self._long = ReaderProcess(shared, arguments, LONG_SECONDS, MAX_LONG_WAITING)

    async def check(self) -> None:
        """Load the model's tokenizer and templates in the process for short requests, and try them.

        Raises:
            K2Error: if they cannot be used; the message names the file.
        """
        await self._short.prepare()

    async def read(self, kind: RequestKind, body: bytes) -> ReadRequest:
        """Read a request in the process for its length."""
        reader = self._long if len(body) > LONG_REQUEST_BYTES else self._short
        return accepted(await reader.read(UnreadRequest(kind, body)))

    async def start(self) -> None:
        """Start the process for short requests, which loads its tokenizer in the background."""
        with contextlib.suppress(K2Error):  # the first request tries again
            await self._short.start()

    async def close(self) -> None:
        """Kill both processes."""
        await asyncio.gather(self._short.close(), self._long.close())
