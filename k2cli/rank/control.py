"""Control connections, which carry the leader's decisions to the followers.

The leader rank listens on a free port, which the guards pass on. Each follower connects, proves
that it knows the run's secret and sends its rank. Decisions go to all followers in order; one
thread per follower reads the answers.
"""

from __future__ import annotations

import queue
import socket
import threading
import time
from collections.abc import Callable

from k2cli.errors import ClusterError
from k2cli.pauses import Deadline, PauseAwareClock
from k2cli.protocol import (
    ControlEndpoint,
    Decision,
    FollowerMessage,
    Hello,
)
from k2cli.protocol.wire import Channel, ConnectionLost, WrongSecret, authenticate, frame

_MAX_STRANGERS = 64
_POLL_SECONDS = 0.02
_HELLO_SECONDS = 5.0


class Followers:
    """The leader's side: a channel to each follower, and one inbox for all of them."""

    def __init__(self, on_loss: Callable[[int, str], None]) -> None:
        """``on_loss`` is called from a thread with (rank, cause) when a follower is lost."""
        self._channels: dict[int, Channel[FollowerMessage]] = {}
        self._sockets: dict[int, socket.socket] = {}
        self._on_loss = on_loss
        self._closing = False
        self._room = threading.BoundedSemaphore(_MAX_STRANGERS)
        self.inbox: queue.Queue[FollowerMessage] = queue.Queue()

    @staticmethod
    def listen(host: str) -> socket.socket:
        """Open a listening socket on a free port of an address of this machine.

        Raises:
            ClusterError: if the address is not one of this machine's.
        """
        try:
            return socket.create_server((host, 0), backlog=128)
        except OSError as error:
            raise ClusterError(f"cannot listen on {host}: {error}") from error

    def accept(
        self, listener: socket.socket, count: int, secret: str, timeout_seconds: float
    ) -> None:
        """Wait until all followers have connected.

        Raises:
            ClusterError: naming the ranks that did not come in time.
        """
        limit = Deadline(timeout_seconds)
        with listener:
            while len(self._channels) < count:
                if limit.has_passed:
                    missing = sorted(set(range(1, count + 1)) - self._channels.keys())
                    raise ClusterError(
                        f"rank {', '.join(map(str, missing))} did not connect to the leader "
                        f"within {timeout_seconds:.0f} s"
                    )
                listener.settimeout(_POLL_SECONDS)
                try:
                    connection, _ = listener.accept()
                except (TimeoutError, ConnectionAbortedError):  # or a stranger is gone again
                    continue
                except OSError:  # a stranger is gone before it was accepted, or no file is left
                    time.sleep(_POLL_SECONDS)
                    continue
                # In a thread of its own, so that a stranger that says nothing delays nobody.
                while not (room := self._room.acquire(timeout=limit.next_wait())):
                    if limit.has_passed:
                        break
                if not room:
                    connection.close()
                    continue
                serve = (connection, secret, count)
                threading.Thread(target=self._serve, args=serve, daemon=True).start()

    def _serve(self, connection: socket.socket, secret: str, count: int) -> None:
        try:
            rank = self._admit(connection, secret, count)
        finally:
            self._room.release()
        if rank is None:
            connection.close()  # not of this run, or a follower that fails on its own side
        else:
            self._read(rank)

    def _admit(self, connection: socket.socket, secret: str, count: int) -> int | None:
        try:
            authenticate(connection, secret, accepting=True)
            channel: Channel[FollowerMessage] = Channel(connection, FollowerMessage)
            limit, hello = Deadline(_HELLO_SECONDS), None
            while hello is None and not limit.has_passed:
                hello = channel.receive(limit.next_wait())
        except ConnectionLost:
            return None
        if not isinstance(hello, Hello) or not 1 <= hello.rank <= count:
            return None
        self._sockets[hello.rank] = connection
        self._channels[hello.rank] = channel  # last: ``accept`` counts them
        return hello.rank

    def _read(self, rank: int) -> None:
        try:
            while True:
                message = self._channels[rank].receive()
                if message is not None:
                    self.inbox.put(message)
        except ConnectionLost as error:
            if not self._closing:
                self._on_loss(rank, str(error))

    def send(self, decision: Decision) -> None:
        """Send a decision to every follower.

        Raises:
            ConnectionLost: if one is gone.
        """
        if not self._sockets:
            return
        data = frame(decision)
        for connection in self._sockets.values():
            try:
                connection.sendall(data)
            except OSError as error:
                raise ConnectionLost(str(error)) from error

    def close(self) -> None:
        """Stop reporting lost followers, before an ordered end."""
        self._closing = True


def connect_to_leader(
    endpoint: ControlEndpoint, rank: int, secret: str, timeout_seconds: float
) -> Channel[Decision]:
    """Connect a follower to the leader and send its rank.

    Raises:
        ClusterError: if the leader cannot be reached, or is not the leader of this run.
    """
    where = f"{endpoint.host}:{endpoint.port}"
    clock = PauseAwareClock()
    limit = Deadline(timeout_seconds, clock)
    try:
        while True:
            connection = socket.create_connection((endpoint.host, endpoint.port), timeout_seconds)
            try:
                authenticate(connection, secret, accepting=False, clock=clock)
                break
            except ConnectionLost as error:
                connection.close()
                if isinstance(error, WrongSecret) or limit.has_passed:
                    raise
                time.sleep(_POLL_SECONDS)  # the leader is busy with strangers
    except (OSError, ConnectionLost) as error:
        raise ClusterError(f"rank {rank} cannot reach the leader at {where}: {error}") from error
    channel: Channel[Decision] = Channel(connection, Decision)
    channel.send(Hello(rank))
    return channel
