"""Named keys over HTTP: real clients with right, wrong, expired and revoked keys, and limits."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any
from unittest import mock

import anthropic
import httpx
import openai
import pytest

from k2cli.access.key_ring import KeyRing
from k2cli.access.keys import digest_of, make_key, make_key_id
from k2cli.protocol import Finished, Generate, KeyLimits, NamedKey, PromptProgress, Tokens
from k2cli.server.engine_client import EngineEvent
from k2cli.server.metrics.activity import Activity
from tests.server.requests import CHAT, QUESTION, SERVED, post
from tests.server.scripted import (
    Hang,
    InlineReader,
    LetterTokenizer,
    ScriptedEngine,
    finished,
    serving,
)
from tests.support.harness import wait_until

RUN_KEY = "k2-of-the-run-itself"


class Named:
    """A named key with its secret."""

    def __init__(
        self, name: str, expires: float | None = None, monitors: bool = False, **limits: int
    ) -> None:
        self.secret = make_key()
        self.key = NamedKey(
            name,
            make_key_id(),
            digest_of(self.secret.encode()),
            time.time(),
            expires,
            KeyLimits(**limits),
            monitors,
        )


class CountingEngine:
    """Answers each request in a few steps, and counts how many of an owner it has at once."""

    def __init__(self) -> None:
        self.state: Any = "ready"
        self.cause = ""
        self.running: dict[str, int] = {}
        self.most: dict[str, int] = {}

    def cancel(self, request_id: str) -> None:
        pass

    async def submit(self, request: Generate) -> AsyncIterator[EngineEvent]:
        owner, size = request.owner, len(request.prompt)
        self.running[owner] = self.running.get(owner, 0) + 1
        self.most[owner] = max(self.most.get(owner, 0), self.running[owner])
        try:
            yield PromptProgress(request.request_id, size, size)
            await asyncio.sleep(0.03)
            yield Tokens(request.request_id, LetterTokenizer().encode("Paris"))
            yield Finished(request.request_id, "stop", size, 5, 0, 0.0, 0.1, 0.1)
        finally:
            self.running[owner] -= 1


class LoopReader(InlineReader):
    """Reads requests, and knows the event loop of the server."""

    loop: asyncio.AbstractEventLoop

    async def start(self) -> None:
        self.loop = asyncio.get_running_loop()


class Keys(KeyRing):
    """Keys that a test replaces as the guard does: in the event loop of the server."""

    reader: LoopReader

    def replace_there(self, *named: Named) -> None:
        done = threading.Event()
        keys = [each.key for each in named]
        self.reader.loop.call_soon_threadsafe(lambda: (self.replace(keys), done.set()))
        assert done.wait(5)


@contextlib.contextmanager
def _served(
    engine: Any, *named: Named, activity: Activity | None = None, **options: Any
) -> Iterator[tuple[str, Keys]]:
    ring = Keys(RUN_KEY, [each.key for each in named])
    served = replace(SERVED, api_key=RUN_KEY, context_length=20_000, **options)
    ring.reader = LoopReader(LetterTokenizer(), served)
    with serving(engine, served, reader=ring.reader, keys=ring, activity=activity) as url:
        yield url, ring


def _openai(url: str, key: str, retries: int = 0) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=retries, timeout=20)


def _anthropic(url: str, key: str) -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=url, api_key=key, max_retries=0, timeout=20)


def _ask(client: openai.OpenAI) -> str:
    answer = client.chat.completions.create(model="toy", messages=QUESTION)
    return answer.choices[0].message.content or ""


def _ask_messages(client: anthropic.Anthropic) -> Any:
    return client.messages.create(model="toy", max_tokens=50, messages=QUESTION)


def test_real_clients_with_right_wrong_expired_and_revoked_keys() -> None:
    alice, old = Named("alice"), Named("old", expires=time.time() - 1)
    with _served(CountingEngine(), alice, old) as (url, ring):
        for key in (alice.secret, RUN_KEY):
            with _openai(url, key) as client, _anthropic(url, key) as other:
                assert _ask(client) == "Paris"
                assert _ask_messages(other).content[0].text == "Paris"
        ring_is = {"wrong API key": make_key(), "expired on": old.secret}
        for words, key in ring_is.items():
            with _openai(url, key) as client, pytest.raises(openai.AuthenticationError) as failed:
                _ask(client)
            assert words in failed.value.message
            assert key not in failed.value.message
            with (
                _anthropic(url, key) as other,
                pytest.raises(anthropic.AuthenticationError, match=words),
            ):
                _ask_messages(other)
        ring.replace_there(old)
        with _openai(url, alice.secret) as client, pytest.raises(openai.AuthenticationError):
            _ask(client)
        with _openai(url, RUN_KEY) as client:
            assert _ask(client) == "Paris"


def test_who_may_see_what_others_do() -> None:
    alice, prometheus = Named("alice"), Named("prometheus", monitors=True)
    lines: list[str] = []
    with (
        _served(CountingEngine(), alice, prometheus, activity=Activity(lines.append)) as (url, _),
        _openai(url, alice.secret) as client,
    ):
        assert _ask(client) == "Paris"
        for key, expected in ((alice, 403), (prometheus, 200)):
            for path in ("/metrics", "/v1/status"):
                headers = {"x-api-key": key.secret}
                answer = httpx.get(url + path, headers=headers, timeout=10)
                assert answer.status_code == expected, answer.text
                assert ("alice" in answer.text) == (expected == 200 and path == "/metrics")
        assert httpx.get(f"{url}/v1/status", headers={"x-api-key": RUN_KEY}).status_code == 200
    assert " key=alice " in lines[0]


def test_every_key_is_compared_in_constant_time() -> None:
    """Each given key is compared with every key of the run, whichever is right."""
    named = [Named(f"user-{number}") for number in range(5)]
    ring = KeyRing(RUN_KEY, [each.key for each in named])
    with mock.patch(
        "k2cli.access.key_ring.hmac.compare_digest", side_effect=lambda one, other: one == other
    ) as compare:
        assert ring.identify([named[0].secret.encode()]).name == "user-0"
        assert ring.identify([named[4].secret.encode()]).name == "user-4"
        assert ring.identify([RUN_KEY.encode()]) is ring.owner
    assert compare.call_count == 3 * 6


def test_a_revoked_key_ends_its_streams_and_nobody_elses() -> None:
    alice, bob = Named("alice"), Named("bob")
    engine = ScriptedEngine()
    letters = LetterTokenizer().encode("Paris")
    for _ in range(2):
        engine.enqueue([PromptProgress("", 5, 5), Tokens("", letters), Hang()])
    with (
        _served(engine, alice, bob) as (url, ring),
        _openai(url, bob.secret) as other,
        _openai(url, alice.secret) as client,
    ):
        of_bob = other.chat.completions.create(model="toy", messages=QUESTION, stream=True)
        assert next(of_bob).choices
        stream = client.chat.completions.create(model="toy", messages=QUESTION, stream=True)
        assert next(stream).choices
        ring.replace_there(bob)
        with pytest.raises(openai.APIError, match="this API key was revoked"):
            for _ in stream:
                pass
        wait_until(lambda: bool(engine.cancelled), 5, "the cancellation of alice's request")
        assert engine.cancelled == [engine.submitted[1].request_id]
        counted = 'k2_requests_total{dialect="chat",key="alice",result="unauthorized"} 1.0'
        headers = {"Authorization": f"Bearer {RUN_KEY}"}
        wait_until(
            lambda: counted in httpx.get(f"{url}/metrics", headers=headers).text, 5, "the count"
        )
        of_bob.close()


def test_a_waiting_request_of_a_revoked_key_never_reaches_the_engine() -> None:
    alice = Named("alice", max_concurrent=1)
    engine = ScriptedEngine()
    engine.enqueue([PromptProgress("", 5, 5), Hang()])
    with _served(engine, alice) as (url, ring), ThreadPoolExecutor(2) as pool:
        body = {"model": "toy", "messages": QUESTION}
        headers = {"Authorization": f"Bearer {alice.secret}"}
        answers = [pool.submit(post, url, body, **headers) for _ in range(2)]
        (client,) = ring.clients
        wait_until(lambda: client.usage.waiting == 1, 5, "waiting")
        ring.replace_there()
        statuses = [answer.result().status_code for answer in answers]
    assert statuses == [401, 401]
    assert len(engine.submitted) == 1


def test_limits_hold_exactly_while_others_are_not_held_back() -> None:
    alice, bob = Named("alice", max_concurrent=2), Named("bob")
    engine = CountingEngine()
    with (
        _served(engine, alice, bob) as (url, _),
        _openai(url, alice.secret) as one,
        _openai(url, bob.secret) as two,
        ThreadPoolExecutor(20) as pool,
    ):
        answers = list(pool.map(_ask, [one, two] * 10))
    assert answers == ["Paris"] * 20
    assert engine.most[alice.key.key_id] == 2
    assert engine.most[bob.key.key_id] > 2


@pytest.mark.parametrize("make", [_openai, _anthropic])
def test_a_refusal_has_numbers_and_a_time_in_each_dialect(make: Callable[..., Any]) -> None:
    alice = Named("alice", max_concurrent=1, max_queued=0)
    engine = ScriptedEngine()
    engine.enqueue([PromptProgress("", 5, 5), Hang()])
    with _served(engine, alice) as (url, _), make(url, alice.secret) as client:
        held = _openai(url, alice.secret)
        with held.chat.completions.create(model="toy", messages=QUESTION, stream=True) as stream:
            ask = _ask if make is _openai else _ask_messages
            with pytest.raises((openai.RateLimitError, anthropic.RateLimitError)) as refused:
                ask(client)
            stream.close()
        held.close()
    error = refused.value
    assert "requests of this key: 1 running and 0 waiting; it may have 1 and 0" in error.message
    assert error.response.headers["retry-after"] == "5"
    body: Any = error.response.json()
    if make is _openai:
        assert body["error"]["code"] == "rate_limit_exceeded"
        assert body["error"]["type"] == "rate_limit_error"
    else:
        assert body["error"]["type"] == "rate_limit_error"
        assert body["type"] == "error"


def test_the_real_client_waits_as_long_as_it_is_told() -> None:
    """One request uses up a minute's tokens; the client comes back when it is told to."""
    alice = Named("alice", tokens_per_minute=600)
    with _served(CountingEngine(), alice) as (url, ring), _openai(url, alice.secret, 2) as client:
        prompt = [5] * 600
        raw = client.completions.with_raw_response.create(model="toy", prompt=prompt)
        assert raw.headers["x-ratelimit-limit-tokens"] == "600"
        assert raw.headers["x-ratelimit-remaining-tokens"] == "0"
        assert raw.headers["x-ratelimit-reset-tokens"].endswith("ms")
        (user,) = ring.clients
        debt = int(-user.usage._bucket.level) if user.usage._bucket else 0
        slept: list[float] = []
        with mock.patch(
            "openai._base_client.SyncAPIClient._sleep_for_retry", autospec=True
        ) as sleep:

            def waits(self: Any, **options: Any) -> None:
                response = options.get("response")
                slept.append(float(response.headers["retry-after"]))
                time.sleep(slept[-1])

            sleep.side_effect = waits
            assert client.completions.create(model="toy", prompt=[5] * 3).choices
    assert debt <= 5
    assert len(slept) == 1
    assert 1 <= slept[0] <= 2


def test_caches_belong_to_a_key_unless_they_are_shared() -> None:
    alice, bob = Named("alice"), Named("bob")
    for shares in (False, True):
        engine = ScriptedEngine()
        with _served(engine, alice, bob, shares_prefixes=shares) as (url, _):
            for key in (alice.secret, bob.secret, RUN_KEY):
                engine.answer("Paris")
                with _openai(url, key) as client:
                    _ask(client)
        owners = [request.owner for request in engine.submitted]
        assert owners == [alice.key.key_id, bob.key.key_id, ""]
        scopes = [request.prefix_scope for request in engine.submitted]
        assert scopes == (["", "", ""] if shares else owners)


def test_a_client_that_leaves_the_queue_makes_room() -> None:
    alice = Named("alice", max_concurrent=1, max_queued=1)
    engine = ScriptedEngine()
    engine.enqueue([PromptProgress("", 5, 5), Hang()])
    engine.enqueue([finished(0)])
    headers = {"Authorization": f"Bearer {alice.secret}"}
    body = {"model": "toy", "messages": QUESTION, "stream": True}
    with (
        _served(engine, alice) as (url, ring),
        httpx.stream("POST", url + CHAT, json=body, headers=headers, timeout=10) as running,
    ):
        (client,) = ring.clients
        with httpx.stream("POST", url + CHAT, json=body, headers=headers, timeout=10) as waiting:
            wait_until(lambda: client.usage.waiting == 1, 5, "waiting")
            assert post(url, body, **headers).status_code == 429
            waiting.close()
        wait_until(lambda: client.usage.waiting == 0, 5, "leaving the queue")
        running.close()
        wait_until(lambda: client.usage.running == 0, 5, "the end of the running one")
        assert post(url, body, **headers).status_code == 200
    assert len(engine.submitted) == 2
