"""Strangers at the ports of guards and ranks, which other machines on the network can reach."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import AsyncIterator

import psutil
import pytest

from k2cli.agent.ports import free_ports
from k2cli.agent.reach import Listening, Target, try_targets
from k2cli.files import decode_json
from k2cli.guard.liveness import GuardConnection, LivenessServer, connect_to_leader
from k2cli.pauses import PauseAwareClock
from k2cli.protocol import ControlEndpoint, GuardStarted
from k2cli.protocol.wire import ConnectionLost, authenticate
from k2cli.protocol.wire_streams import accepted_stream, authenticate_stream, open_stream
from k2cli.rank.control import Followers
from k2cli.rank.control import connect_to_leader as connect_rank
from tests.guard.test_guard_parts import _bootstrap, _until
from tests.support.as_macos import first_accepts

SECRET = "5e" * 32
HELLO = GuardStarted(1, "b", 10, 11)
# Opens connections from an address, reports, and keeps them open until its input ends.
STRANGERS = """
import resource, socket, sys
port, count, source = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 4096), hard))
kept = []
for _ in range(count):
    kept.append(socket.create_connection(("127.0.0.1", port), source_address=(source, 0)))
    kept[-1].sendall(b"x")
print("open", flush=True)
sys.stdin.read()
"""


@contextlib.asynccontextmanager
async def _server(log: list[str]) -> AsyncIterator[tuple[LivenessServer, int]]:
    (port,) = free_ports(1)
    server = LivenessServer(
        _bootstrap(port=port), lambda rank, message: None, lambda rank, why: None, log.append
    )
    await server.listen()
    try:
        yield server, port
    finally:
        await server.close()


@contextlib.asynccontextmanager
async def _strangers(port: int, count: int, source: str = "127.0.0.1") -> AsyncIterator[None]:
    pipe = asyncio.subprocess.PIPE
    child = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", STRANGERS, str(port), str(count), source), stdin=pipe, stdout=pipe
    )
    assert child.stdout is not None
    assert await asyncio.wait_for(child.stdout.readline(), 60) == b"open\n"
    try:
        yield
    finally:
        await child.communicate(b"")


async def test_strangers_use_few_files_and_keep_no_guard_out() -> None:
    log: list[str] = []
    async with _server(log) as (server, port):
        before = psutil.Process().num_fds()
        async with _strangers(port, 500):
            assert psutil.Process().num_fds() - before < 50
            guard = await connect_to_leader(_bootstrap(1, port=port))
            guard.send(HELLO)
            await _until(lambda: not server.missing)
            guard.close()
        assert len(log) < 40


@pytest.mark.skipif(sys.platform != "linux", reason="macOS has one loopback address")
async def test_strangers_of_one_address_displace_only_each_other() -> None:
    async with _server([]) as (_, port):
        reader, writer = await open_stream("127.0.0.1", port)
        async with _strangers(port, 300, "127.0.0.2"):
            await authenticate_stream(reader, writer, SECRET, accepting=False)
        writer.close()


async def test_a_stranger_dropped_in_the_moment_it_connects_is_closed() -> None:
    async with _server([]) as (server, _):
        ours, theirs = socket.socketpair()
        with theirs:
            connection = GuardConnection(*await accepted_stream(ours))
            server._serve_stranger(connection, "127.0.0.2")
            await server.close()
            assert connection.writer.is_closing()


async def test_strangers_are_dropped_after_a_while() -> None:
    async with _server([]) as (_, port):
        before = psutil.Process().num_fds()
        async with _strangers(port, 20):
            await _until(lambda: psutil.Process().num_fds() - before > 20)
            await _until(lambda: psutil.Process().num_fds() - before < 10)


async def test_a_follower_that_is_displaced_tries_again() -> None:
    accepted = 0

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal accepted
        accepted += 1
        if accepted > 2:
            await authenticate_stream(reader, writer, SECRET, accepting=True)
        writer.close()

    listener = await asyncio.start_server(accept, "127.0.0.1", 0)
    port = listener.sockets[0].getsockname()[1]
    guard = await connect_to_leader(_bootstrap(1, port=port))
    guard.close()
    assert accepted == 3
    listener.close()


class _Trickle(socket.socket):
    """A peer that sends one byte after another, each a fifth of a second after the one before."""

    seconds, next_byte = 0.0, 0.2

    def recv(self, *_: object) -> bytes:
        patience = self.gettimeout()
        assert patience is not None
        if patience + self.seconds < self.next_byte:
            self.seconds += patience
            raise TimeoutError
        self.seconds, self.next_byte = self.next_byte, self.next_byte + 0.2
        return b"x"


def test_the_time_to_authenticate_is_that_of_all_bytes_together() -> None:
    with _Trickle() as peer:
        peer.sendall = lambda *_: None  # type: ignore[method-assign, assignment]
        clock = PauseAwareClock(lambda: peer.seconds)
        with pytest.raises(ConnectionLost, match="authentication failed"):
            authenticate(peer, SECRET, accepting=True, timeout_seconds=1.0, clock=clock)
    assert peer.seconds < 2


def test_silent_strangers_keep_no_follower_from_the_leader_rank() -> None:
    followers = Followers(lambda rank, cause: None)
    listener = Followers.listen("127.0.0.1")
    host, port = listener.getsockname()
    accepting = threading.Thread(target=followers.accept, args=(listener, 1, SECRET, 30.0))
    accepting.start()
    strangers = [socket.create_connection((host, port)) for _ in range(100)]
    channel = connect_rank(ControlEndpoint(host, port), 1, SECRET, 30.0)
    accepting.join(10)
    assert not accepting.is_alive()
    followers.close()
    for stranger in (*strangers, channel, followers._channels[1]):
        stranger.close()


async def test_a_stranger_without_an_address_ends_no_listening(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """macOS gives none for a connection to an IPv6 address that was reset (dotnet#121848)."""
    first_accepts(monkeypatch, None, ConnectionAbortedError())
    async with _server([]) as (server, port):
        for _ in range(2):
            await asyncio.to_thread(_connect_and_reset, port)
        guard = await connect_to_leader(_bootstrap(1, port=port))
        guard.send(HELLO)
        await _until(lambda: not server.missing)
        guard.close()


def _connect_and_reset(port: int) -> None:
    with socket.create_connection(("127.0.0.1", port)) as stranger:
        stranger.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def test_a_stranger_that_is_gone_again_keeps_no_follower_from_the_leader_rank(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first_accepts(monkeypatch, ConnectionAbortedError(), None)
    followers = Followers(lambda rank, cause: None)
    listener = Followers.listen("127.0.0.1")
    host, port = listener.getsockname()
    accepting = threading.Thread(target=followers.accept, args=(listener, 1, SECRET, 30.0))
    accepting.start()
    for _ in range(2):
        _connect_and_reset(port)
    channel = connect_rank(ControlEndpoint(host, port), 1, SECRET, 30.0)
    accepting.join(20)
    assert not accepting.is_alive()
    followers.close()
    for each in (channel, followers._channels[1]):
        each.close()


def test_the_doctor_s_listener_outlives_strangers() -> None:
    command = [sys.executable, "-P", "-m", "k2cli.agent.reach", "60"]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        told = decode_json(process.stdout.readline(), Listening)
        process.send_signal(signal.SIGSTOP)
        for _ in range(20):
            _connect_and_reset(told.port)
        process.send_signal(signal.SIGCONT)
        [answer] = try_targets([Target("127.0.0.1", told.port, told.word)])
        process.kill()
    assert answer.error is None
