"""Launches over JACCL are counted on each node by its guards, and the third one warns."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from k2cli import rdma_launches
from k2cli.guard.base import Guard
from k2cli.protocol import Bootstrap, LogLine, RankMessage
from tests.support.bootstraps import make_assignment, make_bootstrap


class _Guard(Guard):
    """A guard whose rank cannot be started, since there is no such module."""

    def __init__(self, bootstrap: Bootstrap) -> None:
        super().__init__(bootstrap, "no.such.module")
        self.events: list[Any] = []

    def emit(self, event: Any) -> None:
        self.events.append(event)

    def on_rank_message(self, message: RankMessage) -> None:
        raise AssertionError(message)


def _bootstrap(run_id: str, rank: int, transport: Any = "jaccl", attempt: int = 1) -> Bootstrap:
    assignment = make_assignment(
        run_id=run_id, rank=rank, size=2, nodes=["a", "a"], transport=transport
    )
    return make_bootstrap(assignment, attempt=attempt)


async def _warnings(bootstrap: Bootstrap) -> list[str]:
    guard = _Guard(bootstrap)
    await guard.start_rank()
    assert guard.rank is not None
    guard.rank.kill()
    await guard.rank.wait()
    await asyncio.sleep(0)
    guard.cancel_tasks()
    return [e.text for e in guard.events if isinstance(e, LogLine) and "JACCL" in e.text]


async def test_the_third_launch_since_the_boot_warns(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert rdma_launches.boot_id()
    for rank in (0, 1):  # of one launch, on one machine
        assert await _warnings(_bootstrap("one", rank)) == []
    assert await _warnings(_bootstrap("of-tcp", 0, "ring")) == []
    assert await _warnings(_bootstrap("two", 0)) == []
    assert rdma_launches.launches_since_boot() == 2
    [warning] = await _warnings(_bootstrap("two", 0, attempt=2))
    assert warning.startswith("warning: 3 launches over JACCL since this machine was started")
    assert "restart the machine" in warning
    other = tmp_path / "boot_id"
    other.write_text("another-boot\n")
    monkeypatch.setattr(rdma_launches, "_BOOT_ID", other)
    monkeypatch.setattr(rdma_launches.sys, "platform", "linux")
    assert rdma_launches.launches_since_boot() == 0
    assert await _warnings(_bootstrap("three", 0)) == []
    assert rdma_launches.launches_since_boot() == 1
