"""Failures at the HTTP API: wrong requests, engines that fail, clients that leave."""

from __future__ import annotations

import json
import socket
import time
from typing import Any

import httpx
import openai
import pytest

from k2cli.protocol import RequestFailed, Tokens
from k2cli.server.served_model import ServedModel
from tests.server.requests import CHAT, QUESTION, encode, events_of, post
from tests.server.scripted import (
    EngineUnavailable,
    Hang,
    ScriptedEngine,
    finished,
    serving,
)

# --- errors -------------------------------------------------------------------------------------

LONG = [{"role": "user", "content": "x" * 300}]
IMAGE = [{"role": "user", "content": [{"type": "image_url"}]}]
POST_HEAD = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
JSON = {"Content-Type": "application/json"}
CALLS = "messages[0].tool_calls"


def _function(**members: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "f", **members}}


def _called(call: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"role": "assistant", "tool_calls": [call]}]


WRONG_REQUESTS: list[tuple[str, dict[str, Any], int, str | None, str]] = [
    (CHAT, {"stop": [5]}, 400, "stop", "must be a string or a list of up to 4 strings"),
    (CHAT, {"stop": ["a", "b", "c", "d", "e"]}, 400, "stop", "5 strings"),
    (CHAT, {"stop": [""]}, 400, "stop", "must not be empty"),
    (CHAT, {"model": "gpt-4"}, 404, "model", "'gpt-4' is not served here"),
    (CHAT, {"messages": []}, 400, "messages", "must not be empty"),
    (CHAT, {"messages": "hi"}, 400, "messages", "array"),
    (CHAT, {"messages": [{"role": "wizard", "content": "x"}]}, 400, "messages[0].role", "'user'"),
    (CHAT, {"messages": [{"role": "user", "content": 5}]}, 400, "messages[0].content", "string"),
    (CHAT, {"messages": IMAGE}, 400, "messages[0].content", "'image_url'"),
    (CHAT, {"messages": [{"role": "tool", "content": "x"}]}, 400, "messages", "refuses a tool's"),
    (CHAT, {"temperature": 3}, 400, "temperature", "less than or equal to 2"),
    (CHAT, {"temperature": "1"}, 400, "temperature", "number"),
    (CHAT, {"temperature": True}, 400, "temperature", "number"),
    (CHAT, {"top_p": -0.1}, 400, "top_p", "greater than or equal to 0"),
    (CHAT, {"max_tokens": 0}, 400, "max_tokens", "greater than or equal to 1"),
    (CHAT, {"max_tokens": 1.5}, 400, "max_tokens", "integer"),
    (CHAT, {"max_tokens": 10**30}, 400, "max_tokens", ""),
    (CHAT, {"messages": LONG}, 400, "messages", "of 200"),
    (CHAT, {"continue_final_message": True}, 400, "continue_final_message", "nothing to continue"),
    (CHAT, {"n": 2}, 400, "n", "1"),
    (CHAT, {"seed": 2**64}, 400, "seed", ""),
    (CHAT, {"logit_bias": {"a": 1}}, 400, "logit_bias", "token ids"),
    (CHAT, {"logit_bias": {"5": 101}}, 400, "logit_bias[5]", "100"),
    (CHAT, {"logit_bias": {"70000": 1}}, 400, "logit_bias", "70000"),
    (CHAT, {"top_logprobs": 2}, 400, "top_logprobs", "needs logprobs"),
    (CHAT, {"logprobs": True, "top_logprobs": 21}, 400, "top_logprobs", "20"),
    (CHAT, {"tools": [], "tool_choice": "required"}, 400, "tool_choice", "there are no tools"),
    (CHAT, {"tool_choice": {"type": "function"}}, 400, "tool_choice", "needs the 'name'"),
    (CHAT, {"tool_choice": {"type": "custom"}}, 400, "tool_choice", "'custom' is not supported"),
    (CHAT, {"tool_choice": "required"}, 400, "tool_choice", "there are no tools"),
    (CHAT, {"parallel_tool_calls": "no"}, 400, "parallel_tool_calls", "boolean"),
    (CHAT, {"tools": [{"type": "custom", "custom": {}}]}, 400, "tools", "0 is of type 'custom'"),
    (CHAT, {"tools": [{"type": "function", "name": "f"}]}, 400, "tools", "with a 'name'"),
    (CHAT, {"tools": [{"type": None}]}, 400, "tools", "tool 0 has no type"),
    (CHAT, {"tools": [_function(parameters=[])]}, 400, "tools", "must be an object"),
    (CHAT, {"tools": [_function(description=5)]}, 400, "tools", "must be a text"),
    (CHAT, {"messages": _called({})}, 400, CALLS, "call 0 needs an object 'function'"),
    (CHAT, {"messages": _called(_function(name=5))}, 400, CALLS, "with a 'name'"),
    (CHAT, {"messages": _called(_function(arguments=5))}, 400, CALLS, "must be JSON text"),
    (CHAT, {"messages": _called({**_function(), "id": 5})}, 400, CALLS, "'id' of call 0"),
    (CHAT, {"messages": _called({"type": "custom"})}, 400, CALLS, "of type 'custom'"),
    (CHAT, {"messages": [{"content": "x"}]}, 400, "messages[0].role", "role: is required"),
    (CHAT, {"messages": [{"role": "user", "content": [{}]}]}, 400, "messages[0].content",
     "part 0 has no type"),
    (CHAT, {"tool_choice": {}}, 400, "tool_choice", "must be a text or an object"),
    (CHAT, {"stop": "a" * 1025}, 400, "stop", "1024 letters"),
    (CHAT, {"n": 3}, 400, "n", "3 is not supported"),
    (CHAT, {"stream_options": {"include_usage": 1}}, 400, "stream_options.include_usage", "bool"),
    (CHAT, {"k2": {"cahce": False}}, 400, "k2.cahce", "unknown field"),
    (CHAT, {"temprature": 1}, 400, "temprature", "unknown field"),
    (CHAT, {"messages": [{"role": "user"}]}, 400, "messages[0]", "needs content"),
    (CHAT, {"chat_template_kwargs": {"self": 1}}, 400, "chat_template_kwargs", "'self'"),
    (CHAT, {"chat_template_kwargs": {"messages": []}}, 400, "chat_template_kwargs", "'messages'"),
    ("/v1/completions", {"prompt": []}, 400, "prompt", "no tokens"),
    ("/v1/completions", {"prompt": ["a", "b"]}, 400, "prompt", "2 prompts"),
    ("/v1/completions", {"prompt": [1, "b"]}, 400, "prompt", "list of token ids"),
    ("/v1/completions", {"prompt": [70000]}, 400, "prompt", "70000"),
    ("/v1/completions", {"prompt": [-1]}, 400, "prompt", "-1"),
    ("/v1/completions", {"echo": True}, 400, "echo", "False"),
]  # fmt: skip


def test_wrong_requests_name_the_field_and_reach_no_rank(engine: ScriptedEngine, url: str) -> None:
    base: dict[str, Any] = {CHAT: {"messages": QUESTION}, "/v1/completions": {"prompt": "x"}}
    for path, change, status, param, part in WRONG_REQUESTS:
        response = post(url, {**base[path], **change}, path)
        error = response.json()["error"]
        assert (response.status_code, error["param"]) == (status, param), (change, error)
        assert part in error["message"], (change, error)
        assert error["type"] == "invalid_request_error"
    assert engine.submitted == []


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b"[1]",
        b"5",
        b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
        b'{"messages": [{"role": "user", "content": "x"}], "temperature": NaN}',
        b"[" * 5000,
    ],
)
def test_bodies_that_are_no_request(engine: ScriptedEngine, url: str, body: bytes) -> None:
    response = post(url, body)
    assert response.status_code == 400
    message = response.json()["error"]["message"]
    assert message
    assert ("nests too deeply" in message) == (len(body) == 5000)
    assert engine.submitted == []


def test_routes_methods_and_size(url: str) -> None:
    for response, status in [
        (httpx.get(f"{url}/v1/nothing"), 404),
        (httpx.get(f"{url}{CHAT}"), 405),
        (post(url, b"x" * 20_001), 413),
        (httpx.post(f"{url}{CHAT}", content=(b"x" * 9000 for _ in range(3)), headers=JSON), 413),
    ]:
        assert response.status_code == status
        assert response.json()["error"]["message"]
        assert "access-control-allow-origin" not in response.headers


@pytest.mark.parametrize(
    ("method", "path", "meant"),
    [
        ("POST", "/chat/completions", "/v1/chat/completions?"),
        ("POST", "/v1/v1/chat/completions", "/v1/chat/completions?"),
        ("POST", "/v1/v1/messages", "/v1/messages? Anthropic's clients want a base URL without"),
        ("POST", "/api/v1/responses/", "/v1/responses?"),
        ("GET", "/models", "/v1/models?"),
        ("GET", "/v1/chat/elsewhere", None),
        ("GET", "/chat/completions", None),
        ("GET", "/", None),
        ("GET", "/api/tags", None),
    ],
)
def test_a_missing_route_suggests_the_one_that_is_meant(
    url: str, method: str, path: str, meant: str | None
) -> None:
    response = httpx.request(method, f"{url}{path}", headers=JSON)
    message = response.json().get("error", {}).get("message", "")
    if isinstance(message, str) and meant is not None:
        assert response.status_code == 404
        assert f"did you mean {meant}" in message
    else:
        assert "did you mean" not in message


def test_api_key(engine: ScriptedEngine) -> None:
    served = ServedModel("toy", context_length=200, api_key="s3cret-clé")
    assert "s3cret" not in repr(served)
    with serving(engine, served) as url:
        none: list[dict[str, str]] = [
            {},
            {"Authorization": "Bearer"},
            {"Authorization": "s3cret-clé"},
            {"x-api-key": ""},
        ]
        wrong = [{"Authorization": "Bearer wrong"}, {"x-api-key": "wrong"}]
        messages = []
        for headers in none + wrong:
            raw = {name: value.encode() for name, value in headers.items()}
            response = httpx.get(f"{url}/v1/models", headers=raw)
            assert response.status_code == 401
            assert response.json()["error"]["code"] == "invalid_api_key"
            messages.append(response.json()["error"]["message"])
        assert len(set(messages[: len(none)])) == 1
        assert "'Authorization: Bearer KEY'" in messages[0]
        assert all("wrong API key" in message for message in messages[len(none) :])
        right = {"Authorization": "Bearer s3cret-clé".encode()}
        assert httpx.get(f"{url}/v1/models", headers=right).status_code == 200
        assert httpx.get(f"{url}/health").status_code == 200
        assert httpx.get(f"{url}/elsewhere").status_code == 401


def test_not_ready(engine: ScriptedEngine, url: str, client: openai.OpenAI) -> None:
    engine.state, engine.cause = "starting", "rank 1 has loaded 3 of 9 GB"
    health = httpx.get(f"{url}/health")
    assert (health.status_code, health.json()["cause"]) == (503, "rank 1 has loaded 3 of 9 GB")
    with pytest.raises(openai.InternalServerError, match="loaded 3 of 9 GB") as caught:
        client.chat.completions.create(model="toy", messages=QUESTION)
    assert caught.value.status_code == 503
    assert httpx.get(f"{url}/v1/models").status_code == 200
    engine.state, engine.cause = "ready", ""
    engine.answer("again")
    got = client.chat.completions.create(model="toy", messages=QUESTION)
    assert got.choices[0].message.content == "again"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("step", "status"),
    [
        (EngineUnavailable("rank 1 on mac2 was lost"), 503),
        (RequestFailed("", "needs 9 GB of cache, and 4 GB are left", "capacity"), 429),
        (RequestFailed("", "a NaN came out", "internal"), 500),
        (RequestFailed("", "this prompt cannot be", "invalid"), 400),
    ],
)
def test_engine_failures_before_an_answer(
    engine: ScriptedEngine, url: str, stream: bool, step: Any, status: int
) -> None:
    engine.enqueue([step])
    response = post(url, {"messages": QUESTION, "stream": stream})
    assert response.status_code == status
    expected = step.cause if isinstance(step, EngineUnavailable) else step.error
    assert response.json()["error"]["message"] == expected


def test_run_lost_in_the_middle(engine: ScriptedEngine, client: openai.OpenAI, url: str) -> None:
    loss = [Tokens("", encode("Par")), EngineUnavailable("rank 1 on mac2 was lost")]
    engine.enqueue(loss)
    stream = client.chat.completions.create(model="toy", messages=QUESTION, stream=True)
    assert [next(stream).choices[0].delta.content for _ in range(2)] == ["", "Par"]
    with pytest.raises(openai.APIError, match="rank 1 on mac2 was lost"):
        next(stream)
    engine.enqueue(loss)
    events = events_of(url, {"messages": QUESTION})
    assert events[-1]["error"]["code"] == "engine_unavailable"
    for script in (loss, [Tokens("", encode("Par")), finished(1, "cancelled")]):
        engine.enqueue(script)
        assert post(url, {"messages": QUESTION}).status_code == 503


# --- clients that leave -------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("script", [[Hang()], [Tokens("", [104]), Hang()]])
def test_a_vanished_client_cancels_its_request(
    engine: ScriptedEngine, url: str, stream: bool, script: list[Any]
) -> None:
    engine.enqueue(script)
    body = json.dumps({"messages": QUESTION, "stream": stream}).encode()
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=5) as connection:
        head = f"{POST_HEAD}Content-Length: {len(body)}\r\n\r\n"
        connection.sendall(head.encode() + body)
        deadline = time.monotonic() + 5
        while not engine.submitted and time.monotonic() < deadline:
            time.sleep(0.01)
    assert engine.cancellation.wait(5)
    assert engine.cancelled == [engine.submitted[0].request_id]
    # And the server goes on.
    engine.answer("next")
    assert post(url, {"messages": QUESTION}).json()["choices"][0]["message"]["content"] == "next"


def test_a_client_that_leaves_while_it_sends(engine: ScriptedEngine, url: str) -> None:
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=5) as connection:
        head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Length: 9000\r\n\r\n"
        connection.sendall(head.encode() + b"{")
    engine.answer("next")
    assert post(url, {"messages": QUESTION}).status_code == 200
    assert len(engine.submitted) == 1


def test_a_client_that_closes_its_stream(engine: ScriptedEngine, client: openai.OpenAI) -> None:
    engine.enqueue([Tokens("", encode("a")), Hang()])
    stream = client.chat.completions.create(model="toy", messages=QUESTION, stream=True)
    next(iter(stream))
    stream.close()
    assert engine.cancellation.wait(5)
