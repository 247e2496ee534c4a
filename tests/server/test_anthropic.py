"""Answers of the Messages API, through the anthropic client and raw HTTP, from a real server."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import anthropic
import httpx
import pytest

from k2cli.protocol import PromptProgress, Tokens
from k2cli.server import streaming
from k2cli.server.client_request import OutputOptions
from k2cli.server.dialects.anthropic_writer import SIGNATURE
from k2cli.server.output.events import (
    AnswerText,
    CallArguments,
    CallBegan,
    CallEnded,
    OutputEvent,
    ReasoningText,
)
from k2cli.server.output.output_format import OutputFormat
from k2cli.server.text_assembler import Piece
from tests.server.requests import QUESTION, SERVED, encode, post, prompt_of
from tests.server.scripted import Hang, ScriptedEngine, finished, serving

PATH = "/v1/messages"
TOOL: Any = {"name": "weather", "input_schema": {"type": "object"}}
BASE: dict[str, Any] = {"model": "toy", "max_tokens": 9, "messages": QUESTION}


@dataclass
class ScriptedParser:
    """Gives the events of the script, one list for each piece of text."""

    steps: deque[list[OutputEvent]] = field(default_factory=deque)
    calls: int = 0
    reasoning_tokens: int = 0

    def push(self, piece: Piece) -> list[OutputEvent]:
        events = self.steps.popleft() if piece.text and self.steps else []
        self.calls += sum(isinstance(event, CallBegan) for event in events)
        self.reasoning_tokens += sum(isinstance(event, ReasoningText) for event in events)
        return events

    def finish(self) -> list[OutputEvent]:
        return []


@dataclass
class Scripted:
    """A server whose engine and parser play scripts."""

    engine: ScriptedEngine
    url: str
    parsers: deque[ScriptedParser]

    def answer(self, *steps: list[OutputEvent], reason: str = "stop") -> None:
        tokens = [Tokens("", encode("x")) for _ in steps]
        self.engine.enqueue([PromptProgress("", 1, 5, 1), *tokens, finished(len(steps), reason)])
        self.parsers.append(ScriptedParser(deque(steps)))


@dataclass(frozen=True)
class ScriptedFormat(OutputFormat):
    """An output format whose parsers give events that a test has chosen."""

    parsers: deque[ScriptedParser] = field(default_factory=deque)

    def parser(self, options: OutputOptions) -> Any:
        return self.parsers.popleft()


@pytest.fixture
def scripted(engine: ScriptedEngine) -> Iterator[Scripted]:
    parsers: deque[ScriptedParser] = deque()
    served = replace(SERVED, output_format=ScriptedFormat(parsers=parsers))
    with serving(engine, served) as url:
        yield Scripted(engine, url, parsers)


@pytest.fixture
def claude(url: str) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=url, api_key="any", max_retries=0, timeout=10) as client:
        yield client


def events_of(url: str, body: dict[str, Any], query: str = "") -> list[tuple[str, Any]]:
    """The names and data of a stream's events."""
    events, name = [], ""
    with httpx.stream("POST", f"{url}{PATH}{query}", json={**body, "stream": True}) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        for line in response.iter_lines():
            if line.startswith("event: "):
                name = line.removeprefix("event: ")
            elif line.startswith("data: "):
                data = json.loads(line.removeprefix("data: "))
                assert data["type"] == name
                events.append((name, data))
    return events


def test_a_whole_answer_with_usage(engine: ScriptedEngine, claude: anthropic.Anthropic) -> None:
    engine.answer("Paris. 😀")
    got = claude.messages.create(
        model="toy",
        max_tokens=30,
        messages=QUESTION,
        system="Be brief",
        stop_sequences=["never"],
        metadata={"user_id": "someone"},
        extra_body={"temperature": 0.5, "top_k": 3, "top_p": 0.25},
    )
    assert [block.to_dict() for block in got.content] == [{"type": "text", "text": "Paris. 😀"}]
    assert (got.role, got.model, got.stop_reason, got.stop_sequence) == (
        "assistant", "toy", "end_turn", None,
    )  # fmt: skip
    # Of the prompt's 5 tokens 1 came from the cache.
    usage = got.usage
    assert (usage.input_tokens, usage.cache_read_input_tokens) == (4, 1)
    assert (usage.cache_creation_input_tokens, usage.output_tokens) == (0, 9)
    assert got._request_id is not None
    assert got._request_id.startswith("req_")
    assert prompt_of(engine) == "<system>Be brief<user>Capital of France?<assistant>"
    request = engine.submitted[0]
    assert request.max_tokens == 30
    sampling = request.sampling
    assert (sampling.temperature, sampling.top_k, sampling.top_p) == (0.5, 3, 0.25)


def test_a_stream_has_blocks_of_thinking_text_and_calls(scripted: Scripted) -> None:
    scripted.answer(
        [ReasoningText("Hm")],
        [ReasoningText("."), AnswerText("\n\n")],
        [AnswerText("I "), AnswerText("look.")],
        [CallBegan(0, "functions.weather:0", "weather"), CallArguments(0, '{"city"')],
        [CallArguments(0, ': "Paris"}'), CallEnded(0)],
        [AnswerText("\n"), CallBegan(1, "functions.weather:1", "weather"), CallEnded(1)],
    )
    events = events_of(scripted.url, BASE, "?beta=true")
    shown = [
        (name, *[data.get(part) for part in ("index", "content_block", "delta") if part in data])
        for name, data in events
    ]
    salt = scripted.engine.submitted[0].request_id[:8]
    call: dict[str, Any] = {"type": "tool_use", "name": "weather", "input": {}}
    first, second = f"toolu_k2_0_weather_{salt}", f"toolu_k2_1_weather_{salt}"
    start, delta, stop = "content_block_start", "content_block_delta", "content_block_stop"
    assert shown == [
        ("message_start",),
        (start, 0, {"type": "thinking", "thinking": "", "signature": ""}),
        (delta, 0, {"type": "thinking_delta", "thinking": "Hm"}),
        (delta, 0, {"type": "thinking_delta", "thinking": "."}),
        (delta, 0, {"type": "signature_delta", "signature": SIGNATURE}),
        (stop, 0),
        (start, 1, {"type": "text", "text": ""}),
        (delta, 1, {"type": "text_delta", "text": "\n\nI "}),
        (delta, 1, {"type": "text_delta", "text": "look."}),
        (stop, 1),
        (start, 2, {**call, "id": first}),
        (delta, 2, {"type": "input_json_delta", "partial_json": '{"city"'}),
        (delta, 2, {"type": "input_json_delta", "partial_json": ': "Paris"}'}),
        (stop, 2),
        (start, 3, {**call, "id": second}),
        (stop, 3),
        ("message_delta", {"stop_reason": "tool_use", "stop_sequence": None}),
        ("message_stop",),
    ]
    begun, ended = events[0][1]["message"]["usage"], events[-2][1]["usage"]
    prompt = len(scripted.engine.submitted[0].prompt)
    assert (begun["input_tokens"], begun["cache_read_input_tokens"]) == (prompt - 1, 1)
    assert (ended["input_tokens"], ended["cache_read_input_tokens"]) == (4, 1)
    assert (ended["output_tokens"], ended["output_tokens_details"]) == (6, {"thinking_tokens": 2})


def test_a_whole_answer_has_the_blocks_of_its_stream(scripted: Scripted) -> None:
    steps: list[list[OutputEvent]] = [
        [ReasoningText("Hm"), AnswerText(" "), ReasoningText(".")],
        [AnswerText("\n\n"), AnswerText("I look.")],
        [CallBegan(0, "functions.weather:0", "weather"), CallArguments(0, '{"a": [1, "é"]}')],
        [CallEnded(0), CallBegan(1, "call_7", "weather"), CallArguments(1, ""), CallEnded(1)],
    ]
    scripted.answer(*steps)
    scripted.answer(*steps)
    with anthropic.Anthropic(base_url=scripted.url, api_key="any", max_retries=0) as client:
        whole = client.messages.create(**BASE)
        with client.messages.stream(**BASE) as stream:
            streamed = stream.get_final_message()
    for message, request in zip((whole, streamed), scripted.engine.submitted, strict=True):
        salt = request.request_id[:8]
        content = [
            block.model_dump(include=set(block.model_fields_set)) for block in message.content
        ]
        for block in content:
            block.pop("parsed_output", None)
        assert content == [
            {"type": "thinking", "thinking": "Hm.", "signature": SIGNATURE},
            {"type": "text", "text": "\n\nI look."},
            {"type": "tool_use", "id": f"toolu_k2_0_weather_{salt}", "name": "weather",
             "input": {"a": [1, "é"]}},
            {"type": "tool_use", "id": "call_7", "name": "weather", "input": {}},
        ]  # fmt: skip
        assert message.stop_reason == "tool_use"


def test_a_tool_loop_gives_the_model_its_own_ids(scripted: Scripted) -> None:
    scripted.answer(
        [ReasoningText("Look"), CallBegan(0, "functions.weather:0", "weather")],
        [CallArguments(0, '{"city": "Paris"}'), CallEnded(0)],
    )
    scripted.answer([AnswerText("Sunny")])
    with anthropic.Anthropic(base_url=scripted.url, api_key="any", max_retries=0) as client:
        first = client.messages.create(**BASE, tools=[TOOL])
        call = first.content[-1]
        assert call.type == "tool_use"
        assert call.input == {"city": "Paris"}
        result: Any = {"type": "tool_result", "tool_use_id": call.id, "content": "sun"}
        messages = [
            *QUESTION,
            {"role": "assistant", "content": first.content},
            {"role": "user", "content": [result, {"type": "text", "text": "And?"}]},
        ]
        counted = client.messages.count_tokens(model="toy", messages=messages, tools=[TOOL])
        second = client.messages.create(**{**BASE, "messages": messages}, tools=[TOOL])
    assert second.stop_reason == "end_turn"
    assert prompt_of(scripted.engine).startswith(
        "<user>Capital of France?<assistant><tool>sun<user>And?<tools:1>"
    )
    assert counted.input_tokens == len(scripted.engine.submitted[-1].prompt)


def test_arguments_that_are_no_object_reach_the_client(scripted: Scripted) -> None:
    for _ in range(2):
        began = CallBegan(0, "functions.weather:0", "weather")
        scripted.answer([began, CallArguments(0, '{"city": Paris')], reason="length")
    whole = post(scripted.url, BASE, PATH).json()
    assert whole["content"][0]["input"] == {"raw_arguments": '{"city": Paris'}
    assert whole["stop_reason"] == "max_tokens"
    events = events_of(scripted.url, BASE)
    assert [data["delta"] for name, data in events if name == "content_block_delta"] == [
        {"type": "input_json_delta", "partial_json": '{"city": Paris'}
    ]
    assert [name for name, _ in events[-3:]] == [
        "content_block_stop", "message_delta", "message_stop",
    ]  # fmt: skip


@pytest.mark.parametrize("parts", [["Par", 'is "x"\n'], ["[1]"], ["{", '"a": 1}']])
def test_the_client_reads_arguments_of_a_stream_that_are_no_object(
    scripted: Scripted, parts: list[str]
) -> None:
    events = [CallArguments(0, part) for part in parts]
    for _ in range(2):
        scripted.answer([CallBegan(0, "functions.f:0", "f"), *events, CallEnded(0)])
    whole = post(scripted.url, BASE, PATH).json()["content"][0]["input"]
    with (
        anthropic.Anthropic(base_url=scripted.url, api_key="any", max_retries=0) as client,
        client.messages.stream(**BASE) as stream,
    ):
        assert stream.get_final_message().content[0].input == whole
    text = "".join(parts)
    assert whole == ({"a": 1} if text.startswith("{") else {"raw_arguments": text})


@pytest.mark.parametrize("stream", [False, True])
def test_reasons_to_stop(engine: ScriptedEngine, claude: anthropic.Anthropic, stream: bool) -> None:
    def ask(**fields: Any) -> Any:
        if not stream:
            return claude.messages.create(**{**BASE, **fields})
        with claude.messages.stream(**{**BASE, **fields}) as answer:
            return answer.get_final_message()

    engine.enqueue([Tokens("", encode("one ST")), Tokens("", encode("OP two")), Hang()])
    stopped = ask(stop_sequences=["STOP"])
    assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", "STOP")
    assert stopped.content[0].text == "one "
    assert engine.cancelled == [engine.submitted[0].request_id]
    engine.answer("one", reason="length")
    assert ask().stop_reason == "max_tokens"
    engine.answer("one", reason="length")
    cut = ask(max_tokens=32_000)
    assert cut.stop_reason == "model_context_window_exceeded"
    engine.enqueue([finished(0)])
    assert ask().content == []


async def test_the_asynchronous_client_and_cancellation(engine: ScriptedEngine, url: str) -> None:
    async with anthropic.AsyncAnthropic(base_url=url, api_key="any", max_retries=0) as client:
        engine.answer("Paris")
        assert (await client.messages.create(**BASE)).stop_reason == "end_turn"
        engine.enqueue([Tokens("", encode("Paris")), Hang()])
        async with client.messages.stream(**BASE) as stream:
            async for text in stream.text_stream:
                assert text == "Paris"
                break
    assert engine.cancellation.wait(10)
    assert engine.cancelled == [engine.submitted[-1].request_id]


def test_pings_while_nothing_comes(
    engine: ScriptedEngine, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streaming, "KEEP_ALIVE_SECONDS", 0.5)
    engine.enqueue([2.4, PromptProgress("", 2, 5, 2), 2.4, Tokens("", encode("a")), finished(1)])
    names = [name for name, _ in events_of(url, BASE)]
    begin = names.index("message_start")
    assert set(names[:begin]) == {"ping"}
    assert "ping" in names[begin : names.index("content_block_start")]


def test_an_agent_finds_the_server_and_its_model(
    engine: ScriptedEngine, url: str, claude: anthropic.Anthropic
) -> None:
    assert httpx.get(url).json() == {"server": "k2"}
    assert httpx.head(f"{url}/").status_code == 200
    (model,) = claude.models.list().data
    assert (model.id, model.type, model.display_name) == ("toy", "model", "toy")
    assert (model.created_at.year, model.max_input_tokens) == (2023, 200)
    assert claude.models.retrieve("toy").id == "toy"
    assert "has_more" not in httpx.get(f"{url}/v1/models").json()
