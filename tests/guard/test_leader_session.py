"""Orders of the supervisor that reach the leader's guard between two attempts."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from k2cli.guard import leader_session
from k2cli.guard.base import Ending
from k2cli.guard.leader_session import LeaderSession
from k2cli.protocol import NextAttempt, StopRun
from tests.support.bootstraps import make_assignment, make_bootstrap

FIRST = make_bootstrap(make_assignment(), restarts=True)


class _Pipe:
    """A supervisor that orders the next attempt and the end at once, while the first one ends."""

    def __init__(self) -> None:
        self.attempt_ends = asyncio.Event()
        self.orders_came = asyncio.Event()

    def send(self, event: Any) -> None:
        pass

    async def flush(self, seconds: float) -> None:
        pass

    async def messages(self) -> AsyncIterator[Any]:
        await self.attempt_ends.wait()
        yield NextAttempt(make_bootstrap(make_assignment(), restarts=True, attempt=2))
        yield StopRun("stopped")
        self.orders_came.set()
        await asyncio.Event().wait()


async def test_an_order_to_stop_counts_though_the_next_attempt_was_ordered_before_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pipe, begun = _Pipe(), []

    class Attempt:
        def __init__(self, bootstrap: Any, *others: Any) -> None:
            self._number = bootstrap.attempt
            self.bootstrap = bootstrap

        def end(self, cause: str, *, failed: bool) -> None:
            """The first attempt is ending, and the second must not begin."""

        async def run(self) -> Ending:
            begun.append(self._number)
            pipe.attempt_ends.set()
            await pipe.orders_came.wait()
            return Ending("rank 1 failed", failed=True)

    monkeypatch.setattr(leader_session, "LeaderGuard", Attempt)
    session = LeaderSession(FIRST, "no.such.module", pipe)  # type: ignore[arg-type]
    async with asyncio.timeout(20):
        assert await session.run() == 0
    assert begun == [1]
