"""The process that runs a chat's MCP servers: it starts them, calls their tools, and ends them.

It is a process of its own so that the chat starts without the package ``mcp``, and so that a
server's messages, however large or malformed, are never read by the chat. It ends with its
connection to the chat, even if the chat was killed, and kills all that its servers left.
"""

from __future__ import annotations

import asyncio
import ctypes
import logging
import os
import signal
import socket
import sys
from collections.abc import Awaitable, Callable
from typing import Any

from k2cli.child_process import limit_memory
from k2cli.protocol.wire import ConnectionLost, Frames, frame
from k2cli.tools.connection import Connection, connected, failure_reason
from k2cli.tools.messages import (
    Call,
    CallDone,
    CancelCall,
    Connect,
    Connected,
    Disconnect,
    Failed,
    FromHost,
    ServerEnded,
    ToHost,
)
from k2cli.tools.processes import MARK, kill_descendants, kill_marked
from k2cli.units import GIB

_MEMORY_BYTES = 2 * GIB
_END_SECONDS = 5.0
_PR_SET_CHILD_SUBREAPER = 36


class Host:
    """The servers and the calls of one chat.

    Args:
        tell: sends a message to the chat.
    """

    def __init__(self, tell: Callable[[FromHost], None]) -> None:
        self._tell = tell
        self._connections: dict[str, Connection] = {}
        self._stops: dict[str, asyncio.Event] = {}
        self._servers: dict[str, asyncio.Task[None]] = {}
        self._calls: dict[int, asyncio.Task[None]] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def obey(self, message: ToHost) -> None:
        """Begin what a message asks for."""
        match message:
            case Connect(server=server):
                stop = self._stops[server.name] = asyncio.Event()
                self._servers[server.name] = self._spawn(self._serve(message, stop))
            case Disconnect(server=name):
                self._stop(name)
            case Call():
                self._calls[message.number] = self._spawn(self._call(message))
            case CancelCall(number=number):
                if (call := self._calls.pop(number, None)) is not None:
                    call.cancel()

    def _stop(self, name: str) -> None:
        """End a server; one that has not listed its tools yet may never do so."""
        stop = self._stops.pop(name, None)
        if stop is not None:
            stop.set()
            if self._connections.pop(name, None) is None:
                self._servers[name].cancel()

    def _spawn(self, work: Any) -> asyncio.Task[None]:
        task: asyncio.Task[None] = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _serve(self, message: Connect, stop: asyncio.Event) -> None:
        """Keep one server until it is no longer wanted, or ends."""
        name, told = message.server.name, False
        reason = ""
        try:
            async with connected(message.server) as (connection, gone):
                self._connections[name] = connection
                self._tell(Connected(message.number, connection.tools, connection.left_out))
                told = True
                await _first(stop.wait(), gone.wait())
                if gone.is_set():
                    # A program that is ending may need a moment to say why.
                    await asyncio.sleep(0.1)
                    reason = connection.end_reason
        except (Exception, asyncio.CancelledError) as error:
            reason = failure_reason(error)
        finally:
            if self._stops.get(name) is stop:
                del self._stops[name]
                self._connections.pop(name, None)
        if not told:
            self._tell(Failed(message.number, reason))
        elif not stop.is_set():
            self._tell(ServerEnded(name, reason))

    async def _call(self, call: Call) -> None:
        connection = self._connections.get(call.server)
        answer: CallDone | Failed
        if connection is None:
            answer = Failed(call.number, f"the server '{call.server}' has ended")
        else:
            try:
                answer = await connection.call(call)
            except Exception as error:
                answer = Failed(call.number, connection.reason_of(error))
        self._calls.pop(call.number, None)
        self._tell(answer)

    async def end(self) -> None:
        """End all servers, and kill every process that they left."""
        for call in list(self._calls.values()):
            call.cancel()
        for name in list(self._stops):
            self._stop(name)
        if self._tasks:
            await asyncio.wait(list(self._tasks), timeout=_END_SECONDS)
        _kill_all()


async def _first(*waits: Awaitable[Any]) -> None:
    tasks = [asyncio.ensure_future(wait) for wait in waits]
    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    for task in tasks:
        task.cancel()


def _kill_all() -> None:
    kill_descendants()
    if sys.platform != "linux":  # nothing is adopted there
        kill_marked(os.environ[MARK])


async def _run(connection: socket.socket) -> None:
    reader, writer = await asyncio.open_connection(sock=connection)
    host = Host(lambda message: writer.write(frame(message)))
    frames: Frames[ToHost] = Frames(ToHost)
    try:
        while chunk := await reader.read(2**16):
            frames.add(chunk)
            while (message := frames.take()) is not None:
                host.obey(message)
    except (OSError, ConnectionLost):
        pass
    finally:
        await host.end()


def main() -> None:
    """Serve the chat at the other end of the socket with the given descriptor, under a mark."""
    connection = socket.socket(fileno=int(sys.argv[1]))
    os.environ[MARK] = sys.argv[2]
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    logging.disable(logging.CRITICAL)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    limit_memory(_MEMORY_BYTES)
    try:
        asyncio.run(_run(connection))
    finally:
        _kill_all()


if __name__ == "__main__":
    main()
