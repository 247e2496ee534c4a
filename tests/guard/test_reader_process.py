"""The process that reads requests, when its guard ends."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys

import pytest

from k2cli.protocol.wire import frame
from k2cli.server.killable_reader import KillableReader, ProcessEnded
from k2cli.server.reader_messages import ReaderSettings


def test_a_reader_whose_guard_ends_before_it_can_answer_ends_without_a_traceback() -> None:
    """The end of its answers may be seen before the end of its input."""
    reading, writing = os.pipe()
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "k2cli.guard.reader_process"],
        stdin=subprocess.PIPE,
        stdout=writing,
        stderr=subprocess.PIPE,
    )
    os.close(writing)
    os.close(reading)
    assert process.stdin is not None
    assert process.stderr is not None
    with process:
        process.stdin.write(frame(ReaderSettings("/nowhere", "demo", 8, 1.0, 1.0, 0)))
        process.stdin.flush()
        assert process.stderr.read() == b""
        assert process.wait(30) == 0


async def test_a_reader_that_is_closed_while_it_is_asked_has_ended_and_is_not_too_large(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    reader = KillableReader(ReaderSettings("/nowhere", "demo", 8, 1.0, 1.0, 0), ())
    with pytest.raises(ProcessEnded):
        await reader.ask(ReaderSettings("", "", 8, 1.0, 1.0, 0), 20.0)
    looks = []

    async def look(seconds: float) -> None:
        looks.append(seconds)
        await sleep(0)

    sleep = asyncio.sleep
    monkeypatch.setattr(asyncio, "sleep", look)
    with pytest.raises(TimeoutError):
        await reader._within(0.1, asyncio.Event().wait())
    assert looks
