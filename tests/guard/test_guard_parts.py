"""Parts of the guards that need no rank: lines, liveness connections, bootstrap files."""

from __future__ import annotations

import asyncio
import fcntl
import os
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest

from k2cli.agent import locks, ports, run_folder
from k2cli.errors import UsageError
from k2cli.guard.liveness import GuardConnection, LivenessServer, connect_to_leader
from k2cli.guard.rank_process import MAX_LINE_CHARACTERS, split_lines
from k2cli.protocol import (
    Bootstrap,
    ControlEndpoint,
    Deadlines,
    GuardStarted,
    LivenessMessage,
    LogLine,
    StopRun,
)
from k2cli.protocol.wire import ConnectionLost, frame
from k2cli.protocol.wire_streams import accepted_stream
from k2cli.settings import RUN_OPTION
from tests.support.bootstraps import SECRET, make_assignment, make_bootstrap


def _bootstrap(rank: int = 0, secret: str = SECRET, port: int = 0) -> Bootstrap:
    return make_bootstrap(
        make_assignment(rank=rank, size=2),
        secret=secret,
        liveness_port=port,
        deadlines=Deadlines(liveness=1.0, initialisation=2.0),
    )


async def _lines_of(*chunks: bytes) -> list[str]:
    stream = asyncio.StreamReader()
    for chunk in chunks:
        stream.feed_data(chunk)
    stream.feed_eof()
    return [line async for line in split_lines(stream)]


async def test_lines_are_whole_bounded_and_harmless() -> None:
    assert await _lines_of(b"one\ntw", b"o\r\n\n50%\r100%\nlast") == [
        "one", "two", "50%", "100%", "last",
    ]  # fmt: skip
    assert await _lines_of(b"\x1b[31mred\x07\xff\n") == ["[31mred�"]
    long, after = await _lines_of(b"x" * 3_000_000 + b"\nafter\n")
    assert long == "x" * MAX_LINE_CHARACTERS + " [cut]"
    assert after == "after"


@asynccontextmanager
async def _server(
    heard: list[Any], lost: list[Any], log: list[str]
) -> AsyncIterator[tuple[LivenessServer, int]]:
    (port,) = ports.free_ports(1)

    def on_message(rank: int, message: LivenessMessage) -> None:
        heard.append(message)

    server = LivenessServer(
        _bootstrap(port=port), on_message, lambda rank, why: lost.append((rank, why)), log.append
    )
    await server.listen()
    yield server, port
    await server.close()


async def _until(condition: Any) -> None:
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.01)


HELLO = GuardStarted(1, "b", 10, 11)


async def test_a_guard_reports_is_told_and_is_missed() -> None:
    heard: list[Any] = []
    lost: list[Any] = []
    async with _server(heard, lost, []) as (server, port):
        assert server.missing == {1}
        server.broadcast(ControlEndpoint("127.0.0.1", 99))
        guard = await connect_to_leader(_bootstrap(1, port=port))
        guard.send(HELLO)
        guard.send(LogLine(1, "b", "rank", "hello"))
        assert await guard.receive(5) == ControlEndpoint("127.0.0.1", 99)
        await _until(lambda: len(heard) == 2)
        assert heard[0] == HELLO
        # It says nothing more, though its connection stays open.
        await _until(lambda: lost)
        assert lost == [(1, "it was silent for 1 s")]
        guard.close()


async def test_a_guard_that_has_finished_can_still_hear() -> None:
    async with _server([], [], []) as (server, port):
        guard = await connect_to_leader(_bootstrap(1, port=port))
        guard.send(HELLO)
        await _until(lambda: not server.missing)
        assert await server.all_finished(0.05) == {1}
        guard.finish()
        guard.send(HELLO)
        assert await server.all_finished(5) == set()
        server.broadcast(ControlEndpoint("127.0.0.1", 7))
        assert await guard.receive(5) == ControlEndpoint("127.0.0.1", 7)
        guard.close()


async def test_a_guard_that_comes_after_the_order_to_end_is_told_to_end() -> None:
    async with _server([], [], []) as (server, port):
        server.broadcast(StopRun("stopped"))
        guard = await connect_to_leader(_bootstrap(1, port=port))
        guard.send(HELLO)
        assert await guard.receive(5) == StopRun("stopped")
        guard.close()


async def test_a_connection_that_is_closed_in_the_moment_of_a_message_is_read_no_more() -> None:
    ours, theirs = socket.socketpair()
    connection = GuardConnection(*await accepted_stream(ours))

    async def serve() -> None:
        while True:
            await connection.receive(60)

    serving = asyncio.create_task(serve())
    await asyncio.sleep(0.01)
    connection.reader.feed_data(frame(HELLO))
    await asyncio.sleep(0)
    serving.cancel()
    try:
        assert await asyncio.wait({serving}, timeout=1) == ({serving}, set())
    finally:
        connection.close()
        theirs.close()


async def test_strangers_and_second_guards_are_refused() -> None:
    heard: list[Any] = []
    log: list[str] = []
    async with _server(heard, [], log) as (server, port):
        with pytest.raises(ConnectionLost):
            await connect_to_leader(_bootstrap(1, secret="00" * 32, port=port))
        guard = await connect_to_leader(_bootstrap(1, port=port))
        guard.send(HELLO)
        await _until(lambda: not server.missing)
        second = await connect_to_leader(_bootstrap(1, port=port))
        second.send(HELLO)
        await _until(lambda: len(log) == 2)
        assert heard == [HELLO]
        guard.close()
        second.close()


async def test_a_leader_that_never_comes_is_not_waited_for_for_ever() -> None:
    (port,) = ports.free_ports(1)
    with pytest.raises(ConnectionLost, match=r"did not answer within 2 s \(Connection refused\)"):
        await connect_to_leader(_bootstrap(1, port=port))


def test_a_bootstrap_is_read_once_and_only_by_its_rank() -> None:
    from k2cli.guard.main import read_bootstrap

    run_folder.write_private("demo-1", "bootstrap-1.json", msgspec.json.encode(_bootstrap(1)))
    assert read_bootstrap("demo-1", "bootstrap-{rank}.json", 1) == _bootstrap(1)
    with pytest.raises(UsageError, match="not a bootstrap file"):
        read_bootstrap("demo-1", "bootstrap-{rank}.json", 1)
    run_folder.write_private("demo-1", "bootstrap-0.json", msgspec.json.encode(_bootstrap(1)))
    with pytest.raises(UsageError, match="is for rank 1"):
        read_bootstrap("demo-1", "bootstrap-{rank}.json", 0)


@pytest.fixture
def lock() -> Path:
    path = locks.lock_path("demo-1")
    path.parent.mkdir(parents=True)
    path.write_text("{}")
    return path


def _run_a_guard_that_fails() -> int:
    """Run a follower's guard whose launcher is gone from the start."""
    run_folder.write_private("demo-1", "bootstrap-1.json", msgspec.json.encode(_bootstrap(1)))
    command = [sys.executable, "-P", "-m", "k2cli.guard.main", RUN_OPTION, "demo-1", "--rank", "1"]
    return subprocess.run(
        [*command, "--bootstrap", "bootstrap-1.json", "--worker-module", "json.tool"],
        stdin=subprocess.DEVNULL,
        timeout=60,
    ).returncode


def test_the_lock_is_released(lock: Path) -> None:
    assert _run_a_guard_that_fails() == 5
    assert not lock.exists()


def test_a_mutex_that_somebody_keeps_costs_a_lock_but_not_the_end(lock: Path) -> None:
    mutex = os.open(lock.parent / ".mutex", os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(mutex, fcntl.LOCK_EX)
        assert _run_a_guard_that_fails() == 5
        assert lock.exists()
    finally:
        os.close(mutex)
