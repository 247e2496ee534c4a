"""The HTTP API, through the openai client and raw sockets, against a real server."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from k2cli.runtime.protocol import PromptProgress, RequestFailed, TokenLogprob, Tokens
from k2cli.server import streaming
from k2cli.server.served import ServedModel, load_served_model
from tests.server.scripted import (
    EngineUnavailable,
    Hang,
    LetterTokenizer,
    ScriptedEngine,
    finished,
    serving,
)

SERVED = ServedModel("toy", context_length=200, created=1_700_000_000, max_body_bytes=20_000)
QUESTION: list[Any] = [{"role": "user", "content": "Capital of France?"}]
CHAT = "/v1/chat/completions"


@pytest.fixture
def engine() -> ScriptedEngine:
    return ScriptedEngine()


@pytest.fixture
def url(engine: ScriptedEngine) -> Iterator[str]:
    with serving(engine, SERVED) as url:
        yield url


@pytest.fixture
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0, timeout=10) as client:
        yield client


def encode(text: str) -> list[int]:
    return LetterTokenizer().encode(text)


def prompt_of(engine: ScriptedEngine) -> str:
    return LetterTokenizer().decode(engine.submitted[-1].prompt)


def post(url: str, body: Any, path: str = CHAT, **headers: str) -> httpx.Response:
    content = body if isinstance(body, bytes | str) else json.dumps(body)
    return httpx.post(f"{url}{path}", content=content, headers=headers, timeout=10)


def events_of(url: str, body: dict[str, Any], path: str = CHAT) -> list[Any]:
    """The events of a stream; ``[DONE]`` and comments as strings."""
    events: list[Any] = []
    with httpx.stream("POST", f"{url}{path}", json={**body, "stream": True}) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        for line in response.iter_lines():
            if line.startswith("data: {"):
                events.append(json.loads(line[6:]))
            elif line:
                events.append(line)
    return events


# --- answers ------------------------------------------------------------------------------------


def test_whole_answer_with_usage_and_timings(engine: ScriptedEngine, client: openai.OpenAI) -> None:
    engine.answer("Paris. 😀")
    got = client.chat.completions.create(model="toy", messages=QUESTION, temperature=0, seed=3)
    assert got.choices[0].message.content == "Paris. 😀"
    assert got.choices[0].finish_reason == "stop"
    assert got.model == "toy"
    assert got.usage is not None
    assert got.usage.prompt_tokens_details is not None
    assert got.usage.prompt_tokens_details.cached_tokens == 1
    assert got.usage.total_tokens == 5 + 9
    assert got.usage.model_extra == {
        "timings": {
            "queue_seconds": 0.25,
            "prefill_seconds": 0.5,
            "decode_seconds": 2.0,
            "prefill_tokens_per_second": 8.0,
            "decode_tokens_per_second": 4.0,
        }
    }
    assert prompt_of(engine) == "<user>Capital of France?<assistant>"
    request = engine.submitted[0]
    assert request.stop_tokens == [1]
    assert request.max_tokens == 200 - len(request.prompt)
    assert (request.sampling.temperature, request.sampling.seed) == (0.0, 3)
    assert engine.cancelled == []


def test_streamed_answer(engine: ScriptedEngine, client: openai.OpenAI) -> None:
    engine.answer("Paris is it. 😀", size=1, reason="length")
    stream = client.chat.completions.create(
        model="toy", messages=QUESTION, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    texts = [c.choices[0].delta.content for c in chunks if c.choices]
    assert "".join(text or "" for text in texts) == "Paris is it. 😀"
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "length"
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 15
    assert len({chunk.id for chunk in chunks}) == 1


@pytest.mark.parametrize("stream", [False, True])
def test_stop_string_across_tokens_cancels_and_counts(
    engine: ScriptedEngine, client: openai.OpenAI, stream: bool
) -> None:
    engine.enqueue([Tokens("", encode("one ST")), Tokens("", encode("OP two")), Hang()])
    options: dict[str, Any] = {"stream_options": {"include_usage": True}} if stream else {}
    got: Any = client.chat.completions.create(
        model="toy", messages=QUESTION, stop=["STOP", "never"], stream=stream, **options
    )
    if stream:
        chunks = list(got)
        text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
        reason, usage = chunks[-2].choices[0].finish_reason, chunks[-1].usage
    else:
        text, reason, usage = (
            got.choices[0].message.content,
            got.choices[0].finish_reason,
            got.usage,
        )
    assert (text, reason) == ("one ", "stop")
    assert usage.completion_tokens == len("one STOP")
    assert engine.cancelled == [engine.submitted[0].request_id]


def test_plain_completions_take_text_and_token_ids(
    engine: ScriptedEngine, client: openai.OpenAI
) -> None:
    engine.answer(" there")
    got = client.completions.create(model="toy", prompt="Hello", max_tokens=7)
    assert got.choices[0].text == " there"
    assert engine.submitted[-1].prompt == [2, *encode("Hello")]
    assert engine.submitted[-1].max_tokens == 7
    engine.answer("abc")
    stream = client.completions.create(model="toy", prompt=[[5, 6]], stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == "abc"
    assert engine.submitted[-1].prompt == [5, 6]


def test_logprobs(engine: ScriptedEngine, client: openai.OpenAI) -> None:
    scored = [
        TokenLogprob(-0.5, [(104, -0.5), (0xD83D, -1.5)]),
        TokenLogprob(-0.25, [(105, -0.25), (104, -2.0)]),
    ]
    for _ in range(2):
        engine.enqueue([Tokens("", encode("hi"), scored), finished(2)])
    got = client.chat.completions.create(
        model="toy", messages=QUESTION, logprobs=True, top_logprobs=2
    )
    assert got.choices[0].logprobs is not None
    first, second = got.choices[0].logprobs.content or []
    assert (first.token, first.logprob, first.bytes) == ("h", -0.5, [104])
    assert [(top.token, top.bytes) for top in first.top_logprobs] == [
        ("h", [104]),
        ("\ufffd", None),
    ]
    assert second.token == "i"
    assert engine.submitted[-1].sampling.top_logprobs == 2
    plain = client.completions.create(model="toy", prompt="x", logprobs=2).choices[0].logprobs
    assert plain is not None
    assert (plain.tokens, plain.text_offset) == (["h", "i"], [0, 1])
    assert plain.token_logprobs == [-0.5, -0.25]


def test_progress_in_a_stream(engine: ScriptedEngine, url: str) -> None:
    script = [PromptProgress("", 2, 5, 1), PromptProgress("", 5, 5), Tokens("", [0xD83D])]
    engine.enqueue([*script, Tokens("", [0xDE00]), finished(2)])
    body = {"messages": QUESTION, "stream_options": {"include_progress": True}}
    events = events_of(url, body)
    assert [event["k2"] for event in events if "k2" in event] == [
        {"prefill_done": 2, "prefill_total": 5, "cached_tokens": 1},
        {"prefill_done": 5, "prefill_total": 5, "cached_tokens": 0},
        {"completion_tokens": 1},
        {"completion_tokens": 2},
    ]
    assert events[-1] == "data: [DONE]"


def test_while_others_are_served(
    engine: ScriptedEngine, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streaming, "KEEP_ALIVE_SECONDS", 0.5)
    engine.enqueue([3.4, Tokens("", encode("a")), finished(1)])
    body = {"messages": QUESTION, "stream_options": {"include_progress": True}}
    events = events_of(url, body)
    assert events[0]["k2"] == {"queue_position": 1}
    assert events[1] == ": waiting"


def test_extensions_template_arguments_and_tools(engine: ScriptedEngine, url: str) -> None:
    engine.answer("ok")
    parts = [{"type": "text", "text": "Be "}, {"type": "text", "text": "brief"}]
    body = {
        "messages": [
            {"role": "developer", "content": parts},
            {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}], "refusal": None},
            {"role": "tool", "content": "42", "tool_call_id": "1"},
        ],
        "tools": [{"type": "function", "function": {"name": "f"}}],
        "tool_choice": "auto",
        "chat_template_kwargs": {"thinking": False},
        "k2": {"cache": False, "ignore_stop_tokens": True},
        "max_completion_tokens": 9,
        "logit_bias": {"104": -5},
        "top_k": -1,
        "stop": None,
        "user": "someone",
        "metadata": {"a": "b"},
    }  # fmt: skip
    assert post(url, body).status_code == 200
    request = engine.submitted[0]
    expected = "<system>Be brief<assistant><tool>42<tools:1><thinking=False><assistant>"
    assert prompt_of(engine) == expected
    assert (request.use_prefix_cache, request.stop_tokens, request.max_tokens) == (False, [], 9)
    assert request.sampling.logit_bias == {104: -5.0}
    assert request.sampling.top_k == 0


def test_defaults_are_the_models_own(engine: ScriptedEngine, tmp_path: Any) -> None:
    suggestion = {"temperature": 0.6, "top_p": "wrong", "top_k": 20, "do_sample": True}
    (tmp_path / "generation_config.json").write_text(json.dumps(suggestion))
    served = load_served_model(tmp_path, "toy", 100)
    engine.answer("a")
    engine.answer("b")
    with serving(engine, served) as url:
        post(url, {"messages": QUESTION})
        post(url, {"messages": QUESTION, "temperature": 0.0, "top_p": None, "top_k": 0})
    first, second = (request.sampling for request in engine.submitted)
    assert (first.temperature, first.top_p, first.top_k) == (0.6, 1.0, 20)
    assert (second.temperature, second.top_k) == (0.0, 0)
    assert load_served_model(tmp_path / "none", "toy", 100).default_temperature == 1.0


def test_models_tokenize_and_health(engine: ScriptedEngine, url: str) -> None:
    listed = httpx.get(f"{url}/v1/models").json()
    assert [model["id"] for model in listed["data"]] == ["toy"]
    assert httpx.get(f"{url}/v1/models/toy").json()["context_length"] == 200
    assert httpx.get(f"{url}/v1/models/org/other").status_code == 404
    counted = post(url, {"prompt": "ab", "add_special_tokens": False}, "/v1/tokenize").json()
    assert (counted["count"], counted["tokens"]) == (2, encode("ab"))
    chat = post(url, {"messages": QUESTION}, "/v1/tokenize").json()
    assert LetterTokenizer().decode(chat["tokens"]) == "<user>Capital of France?<assistant>"
    assert post(url, {}, "/v1/tokenize").json()["error"]["param"] == "messages"
    assert httpx.get(f"{url}/health").json() == {"state": "ready", "model": "toy"}
    assert engine.submitted == []


# --- errors -------------------------------------------------------------------------------------

SCHEMA = {"type": "json_object"}
LONG = [{"role": "user", "content": "x" * 300}]
IMAGE = [{"role": "user", "content": [{"type": "image_url"}]}]
WRONG_REQUESTS: list[tuple[str, dict[str, Any], int, str | None, str]] = [
    (CHAT, {"stop": [5]}, 400, "stop", "must be a string or a list of up to 4 strings"),
    (CHAT, {"stop": ["a", "b", "c", "d", "e"]}, 400, "stop", "5 strings"),
    (CHAT, {"stop": [""]}, 400, "stop", "stops nothing"),
    (CHAT, {"model": "gpt-4"}, 404, "model", "'gpt-4' is not served here; 'toy' is"),
    (CHAT, {"messages": []}, 400, "messages", "at least 1"),
    (CHAT, {"messages": "hi"}, 400, "messages", "array"),
    (CHAT, {"messages": [{"role": "wizard", "content": "x"}]}, 400, "messages[0].role", "'user'"),
    (CHAT, {"messages": [{"role": "user", "content": 5}]}, 400, "messages[0].content", "string"),
    (CHAT, {"messages": IMAGE}, 400, "messages[0].content", "'image_url'"),
    (CHAT, {"messages": [{"role": "tool", "content": "x"}]}, 400, "messages", "refuses a tool's"),
    (CHAT, {"temperature": 3}, 400, "temperature", "less than or equal to 2"),
    (CHAT, {"temperature": "1"}, 400, "temperature", "number"),
    (CHAT, {"temperature": True}, 400, "temperature", "number"),
    (CHAT, {"top_p": 0}, 400, "top_p", "greater than 0"),
    (CHAT, {"max_tokens": 0}, 400, "max_tokens", "greater than or equal to 1"),
    (CHAT, {"max_tokens": 1.5}, 400, "max_tokens", "integer"),
    (CHAT, {"max_tokens": 10**30}, 400, "max_tokens", ""),
    (CHAT, {"max_tokens": 199}, 400, "max_tokens", "the context is 200"),
    (CHAT, {"messages": LONG}, 400, "messages", "of 200"),
    (CHAT, {"n": 2}, 400, "n", "1"),
    (CHAT, {"seed": 2**64}, 400, "seed", ""),
    (CHAT, {"logit_bias": {"a": 1}}, 400, "logit_bias", "token ids"),
    (CHAT, {"logit_bias": {"5": 101}}, 400, "logit_bias[5]", "100"),
    (CHAT, {"logit_bias": {"70000": 1}}, 400, "logit_bias", "70000"),
    (CHAT, {"top_logprobs": 2}, 400, "top_logprobs", "needs logprobs"),
    (CHAT, {"logprobs": True, "top_logprobs": 21}, 400, "top_logprobs", "20"),
    (CHAT, {"response_format": SCHEMA}, 400, "response_format.type", "'json_object'"),
    (CHAT, {"tools": [], "tool_choice": "required"}, 400, "tool_choice", "'auto' and 'none'"),
    (CHAT, {"tool_choice": {"type": "function"}}, 400, "tool_choice", "'auto' and 'none'"),
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
    assert response.json()["error"]["message"]
    assert engine.submitted == []


def test_routes_methods_and_size(url: str) -> None:
    for response, status in [
        (httpx.get(f"{url}/v1/nothing"), 404),
        (httpx.get(f"{url}{CHAT}"), 405),
        (post(url, b"x" * 20_001), 413),
        (httpx.post(f"{url}{CHAT}", content=(b"x" * 9000 for _ in range(3))), 413),
    ]:
        assert response.status_code == status
        assert response.json()["error"]["message"]
        assert "access-control-allow-origin" not in response.headers


def test_api_key(engine: ScriptedEngine) -> None:
    served = ServedModel("toy", context_length=200, api_key="s3cret-clé")
    assert "s3cret" not in repr(served)
    with serving(engine, served) as url:
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "s3cret-clé"}):
            raw = {name: value.encode() for name, value in headers.items()}
            response = httpx.get(f"{url}/v1/models", headers=raw)
            assert response.status_code == 401
            assert response.json()["error"]["code"] == "invalid_api_key"
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
        head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
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
