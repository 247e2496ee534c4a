"""What a follower's guard reports when its rank fails before the leader's guard is there."""

from __future__ import annotations

import asyncio
import os
import socket
import struct
from typing import Any

import pytest

from k2cli.agent import ports
from k2cli.guard import follower, supervisor_pipe
from k2cli.guard.follower import FollowerGuard
from k2cli.guard.liveness import LivenessServer
from k2cli.protocol import Deadlines, LivenessMessage, RankFailed, StopRun
from tests.support.bootstraps import make_assignment, make_bootstrap


async def _never() -> None:
    await asyncio.Event().wait()


async def test_a_failure_reaches_a_leaders_guard_that_starts_long_after_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (port,) = ports.free_ports(1)
    bootstraps = [
        make_bootstrap(
            make_assignment(rank=rank, size=2),
            liveness_port=port,
            deadlines=Deadlines(liveness=20.0, initialisation=60.0),
        )
        for rank in range(2)
    ]
    failures: list[RankFailed] = []

    def on_message(rank: int, message: LivenessMessage) -> None:
        if isinstance(message, RankFailed):
            failures.append(message)
            server.broadcast(StopRun("rank 1 failed", failed=True))

    def on_lost(rank: int, reason: str) -> None:
        closing.append(asyncio.ensure_future(server.close()))

    closing: list[Any] = []
    server = LivenessServer(bootstraps[0], on_message, on_lost, lambda line: None)

    class Guard(FollowerGuard):
        async def end_rank(self, ending: Any) -> bool:
            gone = await super().end_rank(ending)
            await asyncio.sleep(0)
            asyncio.get_running_loop().call_later(0.3, lambda: starts.append(_spawn()))
            return gone

    def _spawn() -> Any:
        return asyncio.ensure_future(server.listen())

    starts: list[Any] = []
    monkeypatch.setattr(follower, "_LAST_WORD_SECONDS", 0.0)
    monkeypatch.setattr(follower, "wait_until_stdin_closes", _never)
    guard = Guard(bootstraps[1], "no.such.module")
    async with asyncio.timeout(30):
        await guard.run()
        await asyncio.gather(*starts, *closing)
    [failure] = failures
    assert failure.cause == "it exited with status 1"
    assert "No module named" in failure.last_lines[-1]


async def test_a_guard_whose_input_is_reset_takes_that_for_its_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """``sshd`` gives a command a socket; closed with unread data it is reset."""
    ours, theirs = socket.socketpair()
    theirs.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    ours.send(b"never read")
    monkeypatch.setattr(os, "dup", lambda descriptor: ours.detach())
    theirs.close()
    async with asyncio.timeout(10):
        await supervisor_pipe.wait_until_stdin_closes()
