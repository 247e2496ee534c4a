"""The authenticated connections between the leader's guard and the other guards.

Each side sends at least one heartbeat a second. Silence for the liveness deadline means that the
other guard is gone, whatever the state of its TCP connection. The leader's guard sends orders
(stop, where to connect); a follower's guard sends all its events. A follower half-closes the
connection once its rank is gone. The leader's guard waits for that before it reports the end.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections import Counter
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any

from k2cli.protocol import (
    Bootstrap,
    ControlEndpoint,
    GuardStarted,
    Heartbeat,
    LivenessMessage,
    LogLine,
    StopRun,
)
from k2cli.protocol.wire import ConnectionLost, WrongSecret
from k2cli.protocol.wire_streams import (
    AsyncChannel,
    accepted_stream,
    authenticate_stream,
    open_stream,
)
from k2cli.system.file_limit import raise_file_limit

_RETRY_SECONDS = 0.2
_BACKLOG = 128
_MAX_STRANGERS = 32
_LOGGED_REFUSALS = 10
_MAX_WAITING_BYTES = 4 * 2**20


@dataclass(slots=True, eq=False)
class GuardConnection:
    """An authenticated connection to another guard."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    channel: AsyncChannel[LivenessMessage] = field(init=False)
    finished: bool = False
    dropped_lines: int = 0

    def __post_init__(self) -> None:
        self.channel = AsyncChannel(self.reader, self.writer, LivenessMessage)

    def send(self, message: LivenessMessage) -> None:
        """Queue a message; do nothing after ``finish``.

        If the other guard does not keep up, lines of the log are dropped and counted.
        """
        if self.finished:
            return
        if isinstance(message, LogLine):
            if self.writer.transport.get_write_buffer_size() > _MAX_WAITING_BYTES:
                self.dropped_lines += 1
                return
            if self.dropped_lines:
                note = f"[{self.dropped_lines} log lines dropped: the leader's guard was too slow]"
                self.dropped_lines = 0
                self.channel.send(LogLine(message.rank, message.node, "guard", note))
        self.channel.send(message)

    async def receive(self, silence_seconds: float) -> LivenessMessage:
        """Return the next message.

        Raises:
            ConnectionLost: if the other guard is gone, or silent for ``silence_seconds``.
        """
        try:
            # Not ``wait_for``, which before Python 3.12 may forget that it was cancelled.
            async with asyncio.timeout(silence_seconds):
                return await self.channel.receive()
        except TimeoutError:
            raise ConnectionLost(f"it was silent for {silence_seconds:.0f} s") from None

    def finish(self) -> None:
        """Half-close: send nothing more, but still receive."""
        if not self.finished and not self.writer.is_closing():
            self.finished = True
            with contextlib.suppress(OSError):
                self.writer.write_eof()

    def close(self) -> None:
        """Close both directions."""
        self.channel.close()


class LivenessServer:
    """The connections of the leader's guard, one per follower.

    Other machines can reach the port. Connections that have not authenticated are therefore few:
    for each one above the limit, the oldest one is closed of the address that has the most. A
    follower that is hit tries again.

    Args:
        bootstrap: address, secret and deadlines.
        on_message: receives a follower's rank and each message except heartbeats.
        on_lost: receives the rank and the reason, once per follower whose guard is gone.
        log: receives lines about refused connections.
    """

    def __init__(
        self,
        bootstrap: Bootstrap,
        on_message: Callable[[int, LivenessMessage], None],
        on_lost: Callable[[int, str], None],
        log: Callable[[str], None],
    ) -> None:
        self._bootstrap = bootstrap
        self._on_message = on_message
        self._on_lost = on_lost
        self._log = log
        self._expected = set(range(1, bootstrap.assignment.size))
        self._connections: dict[int, GuardConnection] = {}
        self._endpoint: ControlEndpoint | None = None
        self._stop: StopRun | None = None
        self._finished: set[int] = set()
        self._change = asyncio.Event()
        self._listener: socket.socket | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._strangers: dict[asyncio.Task[None], str] = {}
        """The connections that have not authenticated, oldest first, and their addresses."""
        self._max_strangers = min(_MAX_STRANGERS, raise_file_limit() // 8)
        self._refused = 0

    async def listen(self) -> None:
        """Open the port.

        Raises:
            OSError: if it is taken.
        """
        host, port = self._bootstrap.liveness_host, self._bootstrap.liveness_port
        found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
        family, *_, address = found[0]
        self._listener = socket.create_server(address, family=family, backlog=_BACKLOG)
        self._listener.setblocking(False)
        self._spawn(self._accept(self._listener))

    @property
    def missing(self) -> set[int]:
        """The ranks whose guards have not connected yet."""
        return self._expected - set(self._connections) - self._finished

    def broadcast(self, message: LivenessMessage) -> None:
        """Send to all guards. One that connects later also gets the endpoint and the end."""
        if isinstance(message, ControlEndpoint):
            self._endpoint = message
        if isinstance(message, StopRun):
            self._stop = message
        for connection in self._connections.values():
            connection.send(message)

    async def all_finished(self, timeout_seconds: float) -> set[int]:
        """Wait until every connected guard has half-closed its connection or is gone.

        Returns:
            The ranks of the others, if the time is up.
        """
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_seconds):
                while set(self._connections) - self._finished:
                    self._change.clear()
                    await self._change.wait()
        return set(self._connections) - self._finished

    async def close(self) -> None:
        """Close the port and all connections."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._listener is not None:
            self._listener.close()
        for connection in self._connections.values():
            connection.close()
        await asyncio.sleep(0)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _accept(self, listener: socket.socket) -> None:
        """Accept connections one by one, each only when there is room for it."""
        while True:
            while len(self._strangers) >= self._max_strangers:
                await self._drop_a_stranger()
            try:
                connection, peer = await asyncio.get_running_loop().sock_accept(listener)
                if peer is None:
                    # macOS, on an IPv6 address: the peer has reset it by now (dotnet#121848).
                    connection.close()
                    continue
                reader, writer = await accepted_stream(connection)
            except OSError as error:  # no file is left, or the peer is gone
                self._log_refusal(str(error))
                if self._strangers:
                    await self._drop_a_stranger()
                await asyncio.sleep(_RETRY_SECONDS)
                continue
            self._serve_stranger(GuardConnection(reader, writer), str(peer[0]))

    def _serve_stranger(self, connection: GuardConnection, address: str) -> None:
        task = self._spawn(self._converse(connection))
        self._strangers[task] = address

        def forget(task: asyncio.Task[None]) -> None:
            self._strangers.pop(task, None)
            if task.cancelled() and connection not in self._connections.values():
                # Not in the task: if it is cancelled before its first step, it runs no line.
                connection.writer.transport.abort()

        task.add_done_callback(forget)

    async def _drop_a_stranger(self) -> None:
        (address, _), *_ = Counter(self._strangers.values()).most_common(1)
        task = next(task for task, other in self._strangers.items() if other == address)
        self._log_refusal(f"{address} has too many that have not authenticated")
        del self._strangers[task]
        task.cancel()
        await asyncio.wait([task], timeout=1.0)
        await asyncio.sleep(0)  # its file is closed now

    def _log_refusal(self, reason: str) -> None:
        """Log the first refusals, and later ones more and more rarely."""
        self._refused += 1
        count = self._refused
        if count <= _LOGGED_REFUSALS or count.bit_count() == 1:
            so_far = f" ({count} so far)" if count > _LOGGED_REFUSALS else ""
            self._log(f"a connection to the liveness port was refused: {reason}{so_far}")

    async def _converse(self, connection: GuardConnection) -> None:
        try:
            await authenticate_stream(
                connection.reader, connection.writer, self._bootstrap.secret, accepting=True
            )
            hello = await connection.receive(self._bootstrap.deadlines.liveness)
            rank = self._admit(hello, connection)
        except ConnectionLost as error:
            self._log_refusal(str(error))
            connection.close()
            return
        task = asyncio.current_task()
        assert task is not None
        self._strangers.pop(task, None)
        self._on_message(rank, hello)
        for missed in (self._endpoint, self._stop):
            if missed is not None:
                connection.send(missed)
        await self._serve(rank, connection)

    def _admit(self, hello: LivenessMessage, connection: GuardConnection) -> int:
        if not isinstance(hello, GuardStarted) or hello.rank not in self.missing:
            raise ConnectionLost("its first message was not that of a missing guard")
        self._connections[hello.rank] = connection
        return hello.rank

    async def _serve(self, rank: int, connection: GuardConnection) -> None:
        reason = ""
        try:
            while True:
                message = await connection.receive(self._bootstrap.deadlines.liveness)
                if not isinstance(message, Heartbeat):
                    self._on_message(rank, message)
        except ConnectionLost as error:
            reason = str(error)
        finally:
            self._finished.add(rank)
            self._change.set()
        self._on_lost(rank, reason)


async def connect_to_leader(bootstrap: Bootstrap) -> GuardConnection:
    """Connect a follower's guard to the leader's guard, which may not listen yet.

    Raises:
        ConnectionLost: if there is no connection within the initialisation deadline, or the other
            side does not know the run's secret.
    """
    host, port = bootstrap.liveness_host, bootstrap.liveness_port
    limit = bootstrap.deadlines.initialisation
    why = ""
    try:
        async with asyncio.timeout(limit):
            while True:
                try:
                    return await _try_leader(host, port, bootstrap.secret)
                except WrongSecret:
                    raise
                except (OSError, ConnectionLost) as error:  # it does not listen yet, or has no room
                    number = getattr(error, "errno", None)
                    why = f" ({os.strerror(number) if number else error})"
                    await asyncio.sleep(_RETRY_SECONDS)
    except TimeoutError:
        raise ConnectionLost(
            f"the leader's guard at {host}:{port} did not answer within {limit:.0f} s{why}"
        ) from None


async def _try_leader(host: str, port: int, secret: str) -> GuardConnection:
    reader, writer = await open_stream(host, port)
    try:
        await authenticate_stream(reader, writer, secret, accepting=False)
    except BaseException:
        writer.close()
        raise
    return GuardConnection(reader, writer)
