"""The process of a rank, as its guard sees it."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from msgspec.structs import replace

from k2cli.choices import Transport
from k2cli.guard import rank_process
from k2cli.guard.base import Guard
from k2cli.guard.rank_process import RankProcess
from k2cli.guard.spawn import SpawnedRank, spawn_rank
from k2cli.protocol import RankFailed, RankMessage
from tests.support.bootstraps import make_assignment, make_bootstrap

_METAL = (
    "libc++abi: terminating due to uncaught exception of type std::runtime_error: "
    "[METAL] Command buffer execution failed: Internal Error (0000000e:Internal Error)"
)


class _Guard(Guard):
    def __init__(self, worker: str) -> None:
        super().__init__(make_bootstrap(make_assignment()), worker)
        self.events: list[Any] = []

    def emit(self, event: Any) -> None:
        self.events.append(event)

    def on_rank_message(self, message: RankMessage) -> None:
        raise AssertionError(message)


async def test_a_rank_that_has_ended_before_its_guard_looks_at_it_is_a_failure_with_its_cause(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def spawn_and_wait(*arguments: Any) -> SpawnedRank:
        spawned = await spawn_rank(*arguments)
        await spawned.process.wait()  # as when the guard gets no processor for a moment
        return spawned

    monkeypatch.setattr(rank_process, "spawn_rank", spawn_and_wait)
    guard = _Guard("no.such.module")
    assert await guard.start_rank()
    async with asyncio.timeout(20):
        await guard.wait_for_ending()
    [failure] = [event for event in guard.events if isinstance(event, RankFailed)]
    assert (failure.cause, failure.exit_status) == ("it exited with status 1", 1)
    assert "No module named" in failure.last_lines[-1]
    assert guard.rank is not None
    assert not guard.rank.is_stopped()
    guard.rank.kill()  # there is nothing left, and no other process is meant
    guard.cancel_tasks()


async def test_the_status_of_a_rank_that_ends_by_itself_is_kept_though_it_is_killed_at_that_moment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """asyncio learns of the end after ``kill``: its thread, or its loop, gets no processor."""
    wait, may_look = os.waitpid, threading.Event()

    def late(pid: int, options: int) -> tuple[int, int]:
        if threading.current_thread() is not threading.main_thread():
            may_look.wait(20)
        return wait(pid, options)

    monkeypatch.setattr(os, "waitpid", late)
    rank = await RankProcess.start(make_bootstrap(make_assignment()), "no.such.module")
    reading = asyncio.create_task(_read(rank))
    while psutil.Process(rank.pid).status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.01)  # the loop must not run
    rank.kill()
    may_look.set()
    async with asyncio.timeout(20):
        assert await rank.wait() == 1
    reading.cancel()


async def _read(rank: RankProcess) -> None:
    async for _ in rank.lines():
        pass


@pytest.mark.parametrize(
    ("transport", "number", "cause"),
    [
        ("ring", "ABRT", f"it was killed by SIGABRT: {_METAL}"),
        ("jaccl", "SEGV", "it was killed by SIGSEGV, as ranks over JACCL are when a Thunderbolt"),
        ("ring", "SEGV", "it was killed by SIGSEGV"),
    ],
)
async def test_a_crash_of_a_library_is_explained_by_what_is_known_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, transport: Transport, number: str, cause: str
) -> None:
    (tmp_path / "crashing_rank.py").write_text(
        f"import os, signal, sys\nsys.stderr.write({_METAL!r} + chr(10) + 'more' + chr(10))\n"
        f"sys.stderr.flush()\nos.kill(os.getpid(), signal.SIG{number})\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    guard = _Guard("crashing_rank")
    guard.bootstrap = replace(
        guard.bootstrap, assignment=replace(guard.bootstrap.assignment, transport=transport)
    )
    assert await guard.start_rank()
    async with asyncio.timeout(20):
        await guard.wait_for_ending()
    [failure] = [event for event in guard.events if isinstance(event, RankFailed)]
    assert failure.cause.startswith(cause)
    assert transport == "jaccl" or failure.cause == cause
    guard.cancel_tasks()
