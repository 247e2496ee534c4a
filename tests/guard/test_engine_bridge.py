"""Requests over the bridge between HTTP and the leader rank."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from k2cli.guard.engine_bridge import EngineBridge
from k2cli.protocol import Cancel, Finished, Generate, RequestFailed, Tokens
from k2cli.server.engine_client import EngineUnavailable


def _finished(request_id: str) -> Finished:
    return Finished(request_id, "stop", 1, 1, 0, 0.0, 0.0, 0.0)


async def _collect(bridge: EngineBridge, request_id: str) -> list[Any]:
    return [event async for event in bridge.submit(Generate(request_id, [1], 4))]


async def test_events_reach_the_request_that_they_belong_to() -> None:
    sent: list[Any] = []
    bridge = EngineBridge(sent.append)
    bridge.ready()
    tasks = [asyncio.create_task(_collect(bridge, name)) for name in "ab"]
    await asyncio.sleep(0)
    assert [message.request_id for message in sent] == ["a", "b"]
    bridge.deliver(Tokens("b", [5]))
    bridge.deliver(Tokens("nobody", [6]))
    bridge.deliver(_finished("b"))
    bridge.deliver(RequestFailed("a", "too long"))
    a, b = await asyncio.gather(*tasks)
    assert a == [RequestFailed("a", "too long")]
    assert b == [Tokens("b", [5]), _finished("b")]
    bridge.cancel("a")
    assert sent[-1] == Cancel("a")


async def test_before_ready_and_after_the_end_requests_get_the_cause() -> None:
    bridge = EngineBridge(lambda message: pytest.fail("nothing may be sent"))
    assert bridge.state == "starting"
    with pytest.raises(EngineUnavailable, match="loading"):
        await _collect(bridge, "a")
    bridge.end("rank 1 on b failed", failed=True)
    bridge.ready()
    assert (bridge.state, bridge.cause) == ("failed", "rank 1 on b failed")
    bridge.cancel("a")
    with pytest.raises(EngineUnavailable, match="rank 1 on b failed"):
        await _collect(bridge, "b")


async def test_the_end_of_the_run_breaks_off_open_requests() -> None:
    bridge = EngineBridge(lambda message: None)
    bridge.ready()
    seen = []

    async def read() -> None:
        async for event in bridge.submit(Generate("a", [1], 4)):
            seen.append(event)

    task = asyncio.create_task(read())
    await asyncio.sleep(0)
    bridge.deliver(Tokens("a", [5]))
    bridge.end("stopped", failed=False)
    with pytest.raises(EngineUnavailable, match=r"^the run has ended: stopped$"):
        await task
    assert seen == [Tokens("a", [5])]
    assert bridge.state == "stopping"
