"""A program that speaks MCP over its standard streams: its start, bounded reading, and its end."""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import signal
import sys
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import anyio
import mcp_types
import psutil
from mcp.shared.message import SessionMessage

from k2cli.child_process import ending_with
from k2cli.tools.processes import MARK, descendants
from k2cli.tools.settings import ServerSettings
from k2cli.units import MIB, clean_text, format_bytes

MOST_LINE_BYTES = 8 * MIB
"""Of one message of a server."""

_VARIABLES = (
    "HOME", "LANG", "LC_ALL", "LC_CTYPE", "LOGNAME", "PATH", "SHELL", "TMPDIR", "TZ", "USER",
)  # fmt: skip
"""Variables that every program gets; keys and tokens of k2's own environment are not among them."""

_USUAL_LIMIT = resource.getrlimit(resource.RLIMIT_DATA)
"""Limit of memory of this process before it gets a smaller one, which is not for programs."""

_MOST_BAD_LINES = 20
_MOST_REQUESTS = 100
"""Requests of a program that wait for its reading of the answers."""

_STDERR_LINES = 20
_STDERR_LINE_BYTES = 2**16
_EXIT_SECONDS = 0.5
_TERM_SECONDS = 0.5
_POLL_SECONDS = 0.02


class Program:
    """One started program."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self._said: deque[str] = deque(maxlen=_STDERR_LINES)
        self._unanswered = 0
        self.problem = ""
        """Reason to end it: a message that is too long, or too many of a kind."""

    @property
    def end_reason(self) -> str:
        """Say how it ended, with its last line on stderr."""
        status = self._process.returncode
        reason = self.problem or (
            "it closed its output"
            if status is None
            else f"it was killed by signal {-status}"
            if status < 0
            else f"it exited with {status}"
        )
        return f"{reason}: {self._said[-1]}" if self._said else reason

    async def read(self, received: Any) -> None:
        """Pass on its messages until its output ends."""
        assert self._process.stdout is not None
        bad = 0
        async with received:
            while True:
                try:
                    line = await self._process.stdout.readuntil(b"\n")
                except asyncio.IncompleteReadError:
                    await self._exits_in(_EXIT_SECONDS)  # so that the reason is known
                    return
                except (asyncio.LimitOverrunError, ValueError):
                    self.problem = f"it sent a message of more than {format_bytes(MOST_LINE_BYTES)}"
                    return
                if not line.strip():
                    continue
                try:
                    message = mcp_types.jsonrpc_message_adapter.validate_json(line, by_name=False)
                except (ValueError, RecursionError):
                    # Some programs print other text. What looks like a message may be an answer
                    # that is waited for.
                    bad += 1
                    if line.lstrip().startswith(b"{") or bad > _MOST_BAD_LINES:
                        self.problem = "it sends lines that are no messages of MCP"
                        return
                    continue
                self._unanswered += isinstance(message, mcp_types.JSONRPCRequest)
                if self._unanswered > _MOST_REQUESTS:
                    self.problem = "it sends requests without reading the answers"
                    return
                try:
                    await received.send(SessionMessage(message))
                except (anyio.ClosedResourceError, anyio.BrokenResourceError):
                    return

    async def write(self, to_send: Any) -> None:
        """Send it messages until there are no more, or it is gone."""
        assert self._process.stdin is not None
        async with to_send:
            async for item in to_send:
                text = item.message.model_dump_json(by_alias=True, exclude_unset=True)
                try:
                    self._process.stdin.write(text.encode() + b"\n")
                    await self._process.stdin.drain()
                except OSError:
                    return
                answer = mcp_types.JSONRPCResponse | mcp_types.JSONRPCError
                self._unanswered -= isinstance(item.message, answer)

    async def keep_stderr(self) -> None:
        """Keep the last lines of its stderr, which is not shown."""
        assert self._process.stderr is not None
        while chunk := await self._process.stderr.read(_STDERR_LINE_BYTES):
            text = clean_text(chunk.decode(errors="replace"))
            self._said.extend(line.strip()[:500] for line in text.splitlines() if line.strip())

    async def end(self) -> None:
        """End it and everything that it started."""
        started = descendants(self._process.pid)
        if self._process.stdin is not None:
            self._process.stdin.close()
        if not await self._exits_in(_EXIT_SECONDS):
            started += descendants(self._process.pid)
            self._signal(signal.SIGTERM)
            await self._exits_in(_TERM_SECONDS)
        self._signal(signal.SIGKILL)
        for each in started:
            with contextlib.suppress(psutil.Error):
                each.kill()
        await self._exits_in(_TERM_SECONDS)

    def _signal(self, number: int) -> None:
        # The program leads a process group of its own, which may outlive it.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, number)

    async def _exits_in(self, seconds: float) -> bool:
        until = asyncio.get_running_loop().time() + seconds
        # Process.wait() would also wait for the pipes, which its children may hold.
        while self._process.returncode is None:
            if asyncio.get_running_loop().time() > until:
                return False
            await asyncio.sleep(_POLL_SECONDS)
        return True


@asynccontextmanager
async def started(settings: ServerSettings) -> AsyncIterator[tuple[Program, Any, Any]]:
    """Start a program and yield it with the streams of its messages; end it at the end.

    Raises:
        OSError: if it cannot be started.
    """
    tie = ending_with(os.getpid()) if sys.platform == "linux" else None

    def before_exec() -> None:
        resource.setrlimit(resource.RLIMIT_DATA, _USUAL_LIMIT)
        if tie is not None:
            tie()

    process = await asyncio.create_subprocess_exec(
        settings.command,
        *settings.args,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=environment(settings),
        limit=MOST_LINE_BYTES,
        start_new_session=True,
        preexec_fn=before_exec,
    )
    program = Program(process)
    received, receiving = anyio.create_memory_object_stream[Any](0)
    sending, to_send = anyio.create_memory_object_stream[Any](0)
    tasks = [
        asyncio.create_task(program.read(received)),
        asyncio.create_task(program.write(to_send)),
        asyncio.create_task(program.keep_stderr()),
    ]
    try:
        yield program, receiving, sending
    finally:
        await program.end()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for stream in (received, receiving, sending, to_send):
            stream.close()


def environment(settings: ServerSettings) -> dict[str, str]:
    """Return the variables that a program gets."""
    own = {name: os.environ[name] for name in _VARIABLES if name in os.environ}
    return own | settings.env | {MARK: os.environ.get(MARK, "")}
