"""One reader process: its start, its limits of time and memory, and the check of the model's files.

The process reads files and requests whose authors decide how long that takes, so every wait for it
is limited, and a process that exceeds a limit is killed.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import msgspec

from k2cli.errors import K2Error
from k2cli.files import decode_with
from k2cli.protocol.wire import LENGTH, MAX_FRAME_BYTES, frame
from k2cli.server.reader_messages import (
    KnownTemplates,
    Loaded,
    NotLoaded,
    ReaderNews,
    ReaderSettings,
    Trying,
)
from k2cli.system.memory_use import memory_of
from k2cli.units import format_bytes

LOAD_SECONDS = 60.0
"""Limit of starting a process, and of reading the tokenizer's file (K2's: 2 s)."""

TRY_SECONDS = 10.0
"""Limit of each trial at the launch: of encoding, compiling and rendering (K2's: 0.1 s)."""

_LOOK_SECONDS = 0.2
_MODULE = "k2cli.guard.reader_process"
_STARTING = Trying("", "reading")
_news: msgspec.msgpack.Decoder[ReaderNews] = msgspec.msgpack.Decoder(ReaderNews)
_T = TypeVar("_T")


class ProcessEnded(Exception):
    """The process ended, or did not keep to the protocol."""


class ProcessTooLarge(Exception):
    """The process has more memory than it may have."""


@dataclass(slots=True)
class _Model:
    """The state that the processes of a model share; the first one to load finds the templates."""

    settings: ReaderSettings
    templates: KnownTemplates | None = None


class KillableReader:
    """A process that can be started, asked and killed, one after another.

    Args:
        settings: the model that is served.
        marks: arguments by which the processes are known as the run's.
    """

    def __init__(self, settings: ReaderSettings, marks: Sequence[str]) -> None:
        self._model = _Model(settings)
        self._arguments = [sys.executable, "-P", "-m", _MODULE, *marks]
        self._process: asyncio.subprocess.Process | None = None
        self._loaded = False

    def another(self) -> KillableReader:
        """Return a second process for the same model, which is not started."""
        other = KillableReader(self._model.settings, ())
        other._model, other._arguments = self._model, self._arguments
        return other

    @property
    def memory_bytes(self) -> int:
        """The memory that a process may have."""
        return self._model.settings.memory_bytes

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
            raise K2Error(f"requests cannot be read: {error.strerror}") from error
        self._loaded = False
        settings = msgspec.structs.replace(self._model.settings, templates=self._model.templates)
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

    async def ask(self, message: msgspec.Struct, seconds: float) -> bytes:
        """Send a message to the loaded process and return the answer.

        Raises:
            TimeoutError, ProcessTooLarge: if the process exceeds a limit.
            ProcessEnded: if it ends.
        """
        return await self._within(seconds, self._exchange(message))

    async def _exchange(self, message: msgspec.Struct) -> bytes:
        process = self._process
        if process is None:  # closed in this very moment, since the API ends
            raise ProcessEnded
        assert process.stdin is not None
        try:
            process.stdin.write(frame(message))
            await process.stdin.drain()
        except OSError as error:
            raise ProcessEnded from error
        return await self._receive()

    async def _receive(self) -> bytes:
        process = self._process
        if process is None:
            raise ProcessEnded
        assert process.stdout is not None
        try:
            (size,) = LENGTH.unpack(await process.stdout.readexactly(LENGTH.size))
            if size > MAX_FRAME_BYTES:
                raise ProcessEnded
            return await process.stdout.readexactly(size)
        except (asyncio.IncompleteReadError, OSError) as error:
            raise ProcessEnded from error

    async def _within(self, seconds: float, work: Coroutine[Any, Any, _T]) -> _T:
        """Wait for the process, but only while it keeps to its limits of time and memory.

        Raises:
            TimeoutError, ProcessTooLarge: if it does not.
            ProcessEnded: if it ends.
        """
        working = asyncio.ensure_future(work)
        watching = asyncio.ensure_future(self._wait_until_too_large())
        both: list[asyncio.Future[Any]] = [working, watching]
        try:
            await asyncio.wait(both, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
            if working.done():
                return working.result()
            raise ProcessTooLarge if watching.done() else TimeoutError
        finally:
            for each in both:
                each.cancel()
            await asyncio.gather(*both, return_exceptions=True)

    async def _wait_until_too_large(self) -> None:
        import psutil

        while True:
            await asyncio.sleep(_LOOK_SECONDS)
            if (process := self._process) is None:
                continue  # it was closed, and is not too large
            with contextlib.suppress(psutil.Error, OSError):  # no file is left to look with
                if memory_of(psutil.Process(process.pid)) > self.memory_bytes:
                    return

    async def load(self) -> None:
        """Start the process if need be, and wait until it takes requests.

        Raises:
            K2Error: if that fails.
        """
        await self.start()
        if self._loaded:
            return
        try:
            with contextlib.suppress(ProcessEnded):
                await self._read_news()
                return
            await self.close()  # something else may have ended it
            await self.start()
            await self._read_news()
        except ProcessEnded as error:
            raise K2Error(str(error)) from error
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
                raise K2Error(_refusal(step, f"takes longer than {limit:.0f} s")) from None
            except ProcessTooLarge:
                raise K2Error(
                    _refusal(step, f"takes more than {format_bytes(self.memory_bytes)}")
                ) from None
            except (ProcessEnded, msgspec.MsgspecError) as error:
                raise ProcessEnded(_refusal(step, "ends the process that does it")) from error
            match news:
                case Trying():
                    step = news
                case NotLoaded(message=message):
                    raise K2Error(message)
                case Loaded(templates=templates):
                    self._model.templates = templates
                    self._loaded = True


def _refusal(step: Trying, problem: str) -> str:
    if not step.file:
        return f"requests cannot be read: starting a process for it {problem}"
    return f"{step.file} cannot be used: {step.work} it {problem}"
