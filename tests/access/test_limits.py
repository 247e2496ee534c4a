"""Limits of one client: exact numbers of requests, and a rate of tokens."""

from __future__ import annotations

import asyncio
import random

import pytest

from k2cli.access.limits import Admission, LimitReached, Usage
from k2cli.protocol import KeyLimits


class Clock:
    """Seconds that a test sets."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def refused(usage: Usage, prompt_tokens: int = 1) -> LimitReached:
    with pytest.raises(LimitReached) as caught:
        usage.admit(prompt_tokens)
    return caught.value


async def test_never_more_at_once_than_allowed_in_order_of_arrival() -> None:
    """200 requests of random length, of which some are given up while they wait or run."""
    usage, chance = Usage(KeyLimits(max_concurrent=3)), random.Random(19)
    at_once, started = [], []

    async def request(number: int) -> None:
        admission = usage.admit(1)
        try:
            await admission.wait_for_turn()
            started.append(number)
            at_once.append(usage.running)
            await asyncio.sleep(chance.choice((0, 0, 0.001)))
        finally:
            admission.close()
            admission.close()

    tasks = [asyncio.create_task(request(number)) for number in range(200)]
    await asyncio.sleep(0)
    for task in chance.sample(tasks, 60):
        task.cancel()
        await asyncio.sleep(0)
    await asyncio.gather(*tasks, return_exceptions=True)
    assert max(at_once) == 3
    assert started == sorted(started)
    assert len(started) >= 140
    assert (usage.running, usage.waiting) == (0, 0)


async def test_a_full_queue_is_refused_with_numbers() -> None:
    usage = Usage(KeyLimits(max_concurrent=2, max_queued=1))
    running = [usage.admit(1), usage.admit(1)]
    waiting = usage.admit(1)
    assert waiting.waits
    error = refused(usage)
    assert "requests of this key: 2 running and 1 waiting; it may have 2 and 1" in error.message
    assert error.retry_seconds > 0
    running[0].close()
    await waiting.wait_for_turn()
    assert not waiting.is_closed
    assert usage.admit(1).waits  # there is room in the queue again


async def test_a_request_that_is_closed_while_it_waits_never_starts() -> None:
    usage = Usage(KeyLimits(max_concurrent=1))
    first, second = usage.admit(1), usage.admit(1)
    waiting = asyncio.create_task(second.wait_for_turn())
    await asyncio.sleep(0)
    second.close()
    await waiting
    assert second.is_closed
    first.close()
    assert (usage.running, usage.waiting) == (0, 0)


async def test_a_higher_limit_starts_what_waits() -> None:
    usage = Usage(KeyLimits(max_concurrent=1))
    usage.admit(1)
    second = usage.admit(1)
    usage.set_limits(KeyLimits(max_concurrent=2))
    assert not second.waits
    assert usage.running == 2


def finish(admission: Admission, prompt: int, cached: int, answer: int) -> None:
    admission.prompt_computed(cached, cached)
    admission.prompt_computed(prompt, cached)
    for _ in range(answer - 1):
        admission.generated(1)
    admission.finished(prompt - cached + answer)  # the stop token is one that nobody was sent
    admission.close()


def test_what_was_computed_counts_and_comes_back_within_a_minute() -> None:
    clock = Clock()
    usage = Usage(KeyLimits(tokens_per_minute=600), clock)
    finish(usage.admit(500), prompt=500, cached=450, answer=150)
    assert usage.headers()["x-ratelimit-remaining-tokens"] == "400"
    # One request may use more than there is, and the rest of the minutes pays for it.
    finish(usage.admit(900), prompt=900, cached=0, answer=100)
    error = refused(usage)
    assert "600 tokens per minute, and has used 600 more" in error.message
    assert error.retry_seconds == 61
    clock.now += error.retry_seconds - 1.5
    assert refused(usage).retry_seconds == 1
    clock.now += 1.5
    usage.admit(1)


def test_prompts_that_wait_are_set_aside_until_their_cached_part_is_known() -> None:
    clock = Clock()
    usage = Usage(KeyLimits(tokens_per_minute=1000), clock)
    first = usage.admit(5000)
    assert "5000 are set aside" in refused(usage).message
    first.prompt_computed(4900, 4900)
    second = usage.admit(10)
    assert usage.headers()["x-ratelimit-remaining-tokens"] == "890"
    # What a cancelled request has not computed is given back.
    first.prompt_computed(4950, 4900)
    first.close()
    second.close()
    assert usage.headers()["x-ratelimit-remaining-tokens"] == "950"


def test_a_client_without_limits_has_no_headers() -> None:
    usage = Usage(KeyLimits())
    for _ in range(1000):
        assert not usage.admit(10**6).waits
    assert usage.headers() == {}


async def test_a_short_request_passes_others_of_its_key_and_a_follow_up_does_not() -> None:
    usage = Usage(KeyLimits(max_concurrent=1))
    running = usage.admit(3, [1, 2, 3], 900)
    long = [usage.admit(60, [number, *range(100, 159)], 900) for number in range(3)]
    follow_up = usage.admit(90, [1, *range(100, 189)], 1)
    short = usage.admit(5, [7, 7, 7, 7, 7], 1)
    running.close()
    order = []
    for _ in range(5):
        (started,) = [a for a in (*long, follow_up, short) if not a.waits and not a.is_closed]
        order.append(started)
        started.prompt_computed(60, 0)
        started.generated(200)
        started.close()
    assert order[0] is short
    assert order.index(follow_up) > order.index(long[1])
    assert (usage.running, usage.waiting) == (0, 0)
