"""Answers of the HTTP API, through the openai client and raw HTTP, from a real server."""

from __future__ import annotations

from typing import Any

import httpx
import openai
import pytest

from k2cli.protocol import PromptProgress, TokenLogprob, Tokens
from k2cli.server import streaming
from k2cli.server.served_model import ServedModel, served_model_from
from tests.server.conftest import SERVED
from tests.server.requests import QUESTION, encode, events_of, post, prompt_of
from tests.server.scripted import (
    Hang,
    LetterTokenizer,
    ScriptedEngine,
    finished,
    serving,
)


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
    calls = [{"id": "1", "function": {"name": "f", "arguments": "{}"}}]
    body = {
        "messages": [
            {"role": "developer", "content": parts},
            {"role": "assistant", "content": None, "tool_calls": calls, "refusal": None},
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


@pytest.mark.parametrize(
    ("cache", "expected"), [(True, (True, True)), (False, (False, True)), ("memory", (True, False))]
)
def test_a_request_says_where_its_cache_is_kept(
    engine: ScriptedEngine, url: str, cache: Any, expected: tuple[bool, bool]
) -> None:
    engine.answer("ok")
    body = {"messages": QUESTION, "k2": {"cache": cache}}
    assert post(url, body).status_code == 200
    (request,) = engine.submitted
    assert (request.use_prefix_cache, request.stores_prefix) == expected
    for wrong in ("disk", 1, 0):
        refused = post(url, body | {"k2": {"cache": wrong}})
        assert refused.status_code == 400
        assert refused.json()["error"]["message"] == 'k2.cache: must be true, false or "memory"'


def test_defaults_are_the_models_own(engine: ScriptedEngine) -> None:
    suggestion = {"temperature": 0.6, "top_p": 2.5, "top_k": 20, "do_sample": True}
    served = served_model_from(suggestion, "toy", 100)
    engine.answer("a")
    engine.answer("b")
    with serving(engine, served) as url:
        post(url, {"messages": QUESTION})
        post(url, {"messages": QUESTION, "temperature": 0.0, "top_p": None, "top_k": 0})
    first, second = (request.sampling for request in engine.submitted)
    assert (first.temperature, first.top_p, first.top_k) == (0.6, 1.0, 20)
    assert (second.temperature, second.top_k) == (0.0, 0)
    assert served_model_from({}, "toy", 100).default_temperature == 1.0


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


def test_a_limit_above_the_room_is_cut_and_the_usage_says_so(
    engine: ScriptedEngine, client: openai.OpenAI
) -> None:
    # opencode#9611: agents send a constant limit, whatever the context.
    engine.answer("Paris")
    got = client.chat.completions.create(model="toy", messages=QUESTION, max_tokens=32_000)
    request = engine.submitted[-1]
    assert request.max_tokens == 200 - len(request.prompt)
    assert got.usage is not None
    assert got.usage.model_extra is not None
    assert got.usage.model_extra["max_tokens"] == request.max_tokens
    engine.answer("Paris")
    got = client.chat.completions.create(model="toy", messages=QUESTION, max_tokens=9)
    assert engine.submitted[-1].max_tokens == 9
    assert got.usage is not None
    assert "max_tokens" not in (got.usage.model_extra or {})


def test_top_p_of_0_keeps_the_best_token(engine: ScriptedEngine, client: openai.OpenAI) -> None:
    engine.answer("Paris")
    client.chat.completions.create(model="toy", messages=QUESTION, top_p=0, temperature=1)
    sampling = engine.submitted[-1].sampling
    assert sampling.top_p == pytest.approx(1e-6)


def test_tools_for_a_template_without_them_are_refused() -> None:
    class Without(LetterTokenizer):
        shows_tools = False

    engine = ScriptedEngine()
    tools = [{"type": "function", "function": {"name": "f"}}]
    with serving(engine, SERVED, Without()) as url:
        refused = post(url, {"messages": QUESTION, "tools": tools})
        assert refused.status_code == 400
        assert refused.json()["error"]["param"] == "tools"
        engine.answer("Paris")
        assert post(url, {"messages": QUESTION, "tools": tools, "tool_choice": "none"}).is_success
        engine.answer("Paris")
        assert post(url, {"messages": QUESTION, "tools": []}).is_success


def test_the_answer_names_the_model_that_was_asked(engine: ScriptedEngine) -> None:
    served = ServedModel("toy", context_length=200, aliases=("gpt-4o", "org/coder"))
    with serving(engine, served) as url:
        for name in ("toy", "gpt-4o", "org/coder", None):
            engine.answer("Paris")
            body = {"messages": QUESTION, "model": name}
            assert post(url, body).json()["model"] == (name or "toy")
            engine.answer("Paris")
            events = events_of(url, {**body, "model": name})
            assert {event["model"] for event in events[:-1]} == {name or "toy"}
        listed = httpx.get(f"{url}/v1/models").json()["data"]
        assert [model["id"] for model in listed] == ["toy", "gpt-4o", "org/coder"]
        assert httpx.get(f"{url}/v1/models/org/coder").json()["id"] == "org/coder"
        refused = post(url, {"messages": QUESTION, "model": "gpt-5"})
        assert refused.status_code == 404
        assert "k2 launch --alias" in refused.json()["error"]["message"]


def test_embeddings_are_refused_with_what_to_do(url: str) -> None:
    refused = post(url, {"model": "text-embedding-3-small", "input": "a"}, "/v1/embeddings")
    error = refused.json()["error"]
    assert (refused.status_code, error["code"]) == (400, "unsupported_route")
    assert "another server" in error["message"]


def test_a_client_reads_drafts_and_turns_them_off(
    client: openai.OpenAI, engine: ScriptedEngine
) -> None:
    end = finished(3, draft_tokens=7, accepted_tokens=2)
    engine.enqueue([Tokens("", encode("abc")), end])
    got = client.chat.completions.create(
        model="toy", messages=QUESTION, extra_body={"k2": {"speculation": False}}
    )
    assert got.usage is not None
    assert got.usage.completion_tokens_details is not None
    assert got.usage.completion_tokens_details.accepted_prediction_tokens == 2
    assert got.usage.completion_tokens_details.rejected_prediction_tokens == 5
    assert not engine.submitted[0].use_speculation
