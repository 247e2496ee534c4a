"""The line that says what a server is doing, from the events that it sends."""

from __future__ import annotations

from k2cli.chat.waiting import Waiting
from k2cli.client.answers import Delta, Progress, ReasoningDelta


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_from_the_queue_to_the_answer() -> None:
    clock = Clock()
    waiting = Waiting(clock)
    clock.now += 3
    assert waiting.status() == "waiting for the server · 3 s"
    waiting.update(Progress(queue_position=2))
    assert waiting.status() == "waiting, position 2 in the queue · 3 s"
    waiting.update(Progress(prefill_done=8192, prefill_total=40_000, cached_tokens=8192))
    clock.now += 10
    assert waiting.status() == (
        "reading the prompt · 13 s · 8,192 of 40,000 tokens · 8,192 from the cache"
    )
    waiting.update(Progress(prefill_done=10_192, prefill_total=40_000, cached_tokens=8192))
    assert "· 2 min 29 s left ·" in waiting.status()
    clock.now += 20
    assert "· 2 min 09 s left ·" in waiting.status()  # it goes on while nothing arrives
    clock.now += 1000
    assert "· soon done ·" in waiting.status()
    waiting.update(Progress(completion_tokens=1))
    waiting.update(ReasoningDelta("Hm"))
    clock.now += 10
    waiting.update(Progress(completion_tokens=1501))
    waiting.update(ReasoningDelta("."))
    assert waiting.status() == "thinking · 17 min 23 s · 1,501 tokens · 150.0 tokens/s"
    assert waiting.thought() == "thought for 10 s, 1,501 tokens"
    clock.now += 1
    waiting.update(Progress(completion_tokens=1511))
    waiting.update(Delta("Yes"))
    assert waiting.status().startswith("answering · ")
    assert waiting.thought() == "thought for 10 s, 1,501 tokens"


def test_another_server_sends_text_alone() -> None:
    clock = Clock()
    waiting = Waiting(clock)
    for _ in range(3):
        waiting.update(Delta("x"))
        clock.now += 1
    assert waiting.status() == "answering · 3 s · 3 tokens · 0.7 tokens/s"
    assert waiting.thought() == ""
