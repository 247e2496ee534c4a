"""Answers that take long: something is sent meanwhile, in a stream and before a whole answer."""

from __future__ import annotations

import json
from typing import Any

import httpx
import openai
import pytest

from k2cli.protocol import Tokens
from k2cli.server import streaming
from tests.server.requests import CHAT, QUESTION, encode, events_of
from tests.server.scripted import EngineUnavailable, Hang, ScriptedEngine, finished


@pytest.fixture(autouse=True)
def _short_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "KEEP_ALIVE_SECONDS", 0.2)


RESPONSES = "/v1/responses"


def _raw_chunks(url: str, body: dict[str, Any], path: str = CHAT) -> list[bytes]:
    with httpx.stream("POST", f"{url}{path}", json=body, timeout=20) as response:
        assert response.status_code == 200
        return list(response.iter_raw())


def test_whitespace_comes_before_a_slow_answer(
    engine: ScriptedEngine, url: str, client: openai.OpenAI
) -> None:
    script = [0.9, Tokens("", encode("Paris")), finished(5)]
    engine.enqueue(script)
    chunks = _raw_chunks(url, {"messages": QUESTION})
    whole = b"".join(chunks)
    spaces = len(whole) - len(whole.lstrip(b" "))
    assert spaces >= 2
    assert chunks[0] == b" "  # sent while the engine was silent, and not with the answer
    assert json.loads(whole)["choices"][0]["message"]["content"] == "Paris"
    engine.enqueue(script)
    got = client.chat.completions.create(model="toy", messages=QUESTION)
    assert got.choices[0].message.content == "Paris"


def test_an_error_after_the_whitespace_is_an_error_object(engine: ScriptedEngine, url: str) -> None:
    engine.enqueue([0.9, EngineUnavailable("rank 1 on mac2 was lost")])
    chunks = _raw_chunks(url, {"messages": QUESTION})
    error = json.loads(b"".join(chunks))["error"]
    assert chunks[0] == b" "
    assert (error["code"], error["message"]) == ("engine_unavailable", "rank 1 on mac2 was lost")


def test_a_client_that_leaves_while_it_waits_cancels(engine: ScriptedEngine, url: str) -> None:
    engine.enqueue([Hang()])
    body = {"messages": QUESTION}
    with httpx.stream("POST", f"{url}{CHAT}", json=body, timeout=20) as response:
        assert next(response.iter_raw()) == b" "
    assert engine.cancellation.wait(5)


def test_a_slow_stream_has_comments(engine: ScriptedEngine, url: str) -> None:
    engine.enqueue([3.4, Tokens("", encode("Paris")), finished(5)])
    events = events_of(url, {"messages": QUESTION})
    assert events[0] == ": waiting"
    assert events.count(": waiting") >= 2
    texts = [
        event["choices"][0]["delta"].get("content") or ""
        for event in events
        if isinstance(event, dict) and event["choices"]
    ]
    assert "".join(texts) == "Paris"


# --- Responses ------------------------------------------------------------------------------------


def test_whitespace_comes_before_a_slow_response(
    engine: ScriptedEngine, url: str, client: openai.OpenAI
) -> None:
    script = [0.9, Tokens("", encode("Paris")), finished(5)]
    engine.enqueue(script)
    chunks = _raw_chunks(url, {"input": "Hi"}, RESPONSES)
    assert chunks[0] == b" "
    assert json.loads(b"".join(chunks))["status"] == "completed"
    engine.enqueue(script)
    assert client.responses.create(model="toy", input="Hi").output_text == "Paris"
    engine.enqueue([0.9, EngineUnavailable("rank 1 on mac2 was lost")])
    chunks = _raw_chunks(url, {"input": "Hi"}, RESPONSES)
    assert chunks[0] == b" "
    assert json.loads(b"".join(chunks))["error"]["code"] == "engine_unavailable"


def test_a_slow_stream_of_responses_has_comments(
    engine: ScriptedEngine, url: str, client: openai.OpenAI
) -> None:
    script = [3.4, Tokens("", encode("Paris")), finished(5)]
    engine.enqueue(script)
    text = b"".join(_raw_chunks(url, {"input": "Hi", "stream": True}, RESPONSES)).decode()
    created, first = text.index("event: response.created"), text.index("output_item.added")
    assert created < text.index(": waiting") < first
    engine.enqueue(script)
    with client.responses.stream(model="toy", input="Hi") as stream:
        assert stream.get_final_response().output_text == "Paris"


def test_a_client_that_leaves_while_it_waits_for_a_response_cancels(
    engine: ScriptedEngine, url: str
) -> None:
    engine.enqueue([Hang()])
    with httpx.stream("POST", f"{url}{RESPONSES}", json={"input": "Hi"}, timeout=20) as response:
        assert next(response.iter_raw()) == b" "
    assert engine.cancellation.wait(5)
