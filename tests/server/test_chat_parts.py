"""The parts of chat's answers: reasoning, text and tool calls, whole and streamed."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import openai
import pytest

from k2cli.protocol import TokenLogprob, Tokens
from tests.server.requests import QUESTION, call_text, calls_text, encode, events_of, post
from tests.server.scripted import Hang, ScriptedEngine, finished

TOOLS: list[Any] = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
THOUGHT = "I need two files."
ARGUMENTS = ('{"path":  "a.py"}', '{"path": "b.py", "n": [1, {"x": "é😀"}]}')
CALLS = calls_text(call_text(0, ARGUMENTS[0]), call_text(1, ARGUMENTS[1]))
ANSWER = f"<think>{THOUGHT}</think>Let me look. {CALLS}"
ASK: dict[str, Any] = {"messages": QUESTION, "tools": TOOLS}


def _streamed(url: str, **fields: Any) -> tuple[dict[str, Any], str, list[Any]]:
    """The message that a client puts together from a stream, its finish reason, and the events."""
    events = events_of(url, {**ASK, **fields, "stream_options": {"include_usage": True}})
    message: dict[str, Any] = {}
    calls: defaultdict[int, dict[str, Any]] = defaultdict(dict)
    reason = ""
    for event in events:
        for choice in event["choices"] if isinstance(event, dict) else []:
            reason = choice["finish_reason"] or reason
            for name, value in choice["delta"].items():
                if name == "tool_calls":
                    assert len(value) == 1
                    call, function = calls[value[0]["index"]], value[0]["function"]
                    call["arguments"] = call.get("arguments", "") + function["arguments"]
                    for part in ("id", "type"):
                        if part in value[0]:
                            assert part not in call
                            call[part] = value[0][part]
                    if "name" in function:
                        call["name"] = function["name"]
                elif isinstance(value, str):
                    message[name] = (message.get(name) or "") + value
                else:
                    message.setdefault(name, value)
    if calls:
        message["tool_calls"] = [calls[index] for index in sorted(calls)]
    return message, reason, events


def _whole(url: str, **fields: Any) -> tuple[dict[str, Any], str, dict[str, Any]]:
    answer = post(url, {**ASK, **fields}).json()
    (choice,) = answer["choices"]
    return choice["message"], choice["finish_reason"], answer["usage"]


def _call(index: int, arguments: str) -> dict[str, Any]:
    function = {"name": "f", "arguments": arguments}
    return {"id": f"functions.f:{index}", "type": "function", "function": function}


def test_a_whole_answer_has_reasoning_text_and_calls_apart(
    engine: ScriptedEngine, url: str
) -> None:
    engine.answer(ANSWER)
    message, reason, usage = _whole(url)
    assert message == {
        "role": "assistant",
        "content": "Let me look. ",
        "refusal": None,
        "reasoning_content": THOUGHT,
        "reasoning": THOUGHT,
        "tool_calls": [_call(0, ARGUMENTS[0]), _call(1, ARGUMENTS[1])],
    }
    assert reason == "tool_calls"
    assert usage["completion_tokens_details"]["reasoning_tokens"] == len(THOUGHT)
    engine.answer(CALLS)
    message, _, usage = _whole(url)
    assert message["content"] is None
    assert "reasoning" not in message
    assert usage["completion_tokens_details"]["reasoning_tokens"] == 0


@pytest.mark.parametrize("size", [1, 3, 1000])
def test_a_stream_has_the_same_parts_as_they_are_generated(
    engine: ScriptedEngine, url: str, size: int
) -> None:
    engine.answer(ANSWER, size=size)
    message, reason, events = _streamed(url)
    assert message == {
        "role": "assistant",
        "content": "Let me look. ",
        "reasoning_content": THOUGHT,
        "reasoning": THOUGHT,
        "tool_calls": [
            {"id": f"functions.f:{index}", "type": "function", "name": "f", "arguments": arguments}
            for index, arguments in enumerate(ARGUMENTS)
        ],
    }
    assert reason == "tool_calls"
    assert events[-2]["usage"]["completion_tokens_details"]["reasoning_tokens"] == len(THOUGHT)
    assert events[0]["choices"][0]["delta"] == {"role": "assistant", "content": None}
    if size == 1:
        pieces = [
            call["function"]["arguments"]
            for event in events[:-1]
            for choice in event["choices"]
            for call in choice["delta"].get("tool_calls", ())
        ]
        assert len(pieces) > 20  # not the whole arguments at the end


def test_openais_client_puts_a_stream_together(
    engine: ScriptedEngine, client: openai.OpenAI
) -> None:
    engine.answer(ANSWER)
    with client.chat.completions.stream(model="toy", messages=QUESTION, tools=TOOLS) as stream:
        stream.until_done()
    choice = stream.get_final_completion().choices[0]
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content == "Let me look. "
    assert choice.message.tool_calls is not None
    assert [call.function.arguments for call in choice.message.tool_calls] == list(ARGUMENTS)
    assert [call.id for call in choice.message.tool_calls] == ["functions.f:0", "functions.f:1"]


@pytest.mark.parametrize("stream", [False, True])
def test_one_call_only_ends_the_answer_in_the_engine(
    engine: ScriptedEngine, url: str, stream: bool
) -> None:
    tokens = encode(ANSWER)
    engine.enqueue([*(Tokens("", tokens[i : i + 7]) for i in range(0, len(tokens), 7)), Hang()])
    ask = _streamed if stream else _whole
    message, reason, rest = ask(url, parallel_tool_calls=False)
    assert [call["id"] for call in message["tool_calls"]] == ["functions.f:0"]
    assert reason == "tool_calls"
    assert engine.cancelled == [engine.submitted[0].request_id]
    usage: Any = rest[-2]["usage"] if stream else rest
    first = ANSWER.index("<|tool_call_end|>") + len("<|tool_call_end|>")
    assert first <= usage["completion_tokens"] < first + 7


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_that_is_cut_off(engine: ScriptedEngine, url: str, stream: bool) -> None:
    ask = _streamed if stream else _whole
    cut = ANSWER.index(', "n"')
    engine.answer(ANSWER[:cut], reason="length")
    message, reason, _ = ask(url)
    calls = [call.get("function", call)["arguments"] for call in message["tool_calls"]]
    assert (calls, reason) == ([ARGUMENTS[0], ARGUMENTS[1].partition(', "n"')[0]], "length")
    engine.answer(f"<think>{THOUGHT}", reason="length")
    message, reason, rest = ask(url)
    assert (message["reasoning"], reason) == (THOUGHT, "length")
    assert not message["content"]
    assert "tool_calls" not in message
    usage: Any = rest[-2]["usage"] if stream else rest
    assert usage["completion_tokens_details"]["reasoning_tokens"] == len(THOUGHT)


def test_arguments_that_are_no_json_reach_the_client(engine: ScriptedEngine, url: str) -> None:
    broken = '{"path": "a.py", "text": no quotes}'
    engine.answer(calls_text(call_text(0, broken)))
    message, reason, _ = _whole(url)
    assert (message["tool_calls"], reason) == ([_call(0, broken)], "tool_calls")


def test_reasoning_can_be_left_out(engine: ScriptedEngine, url: str) -> None:
    for ask in (_whole, _streamed):
        engine.answer(ANSWER)
        message, _, _ = ask(url, include_reasoning=False)
        assert {"reasoning", "reasoning_content"}.isdisjoint(message)
        assert message["content"] == "Let me look. "
        assert len(message["tool_calls"]) == 2


@pytest.mark.parametrize("fields", [{"tool_choice": "none"}, {"tools": None}])
def test_markers_are_text_if_the_model_may_call_nothing(
    engine: ScriptedEngine, url: str, fields: dict[str, Any]
) -> None:
    engine.answer(ANSWER)
    message, reason, _ = _whole(url, **fields)
    assert message["content"] == f"Let me look. {CALLS}"
    assert "tool_calls" not in message
    assert (message["reasoning"], reason) == (THOUGHT, "stop")


def test_a_stop_string_after_a_call_and_within_one(engine: ScriptedEngine, url: str) -> None:
    engine.enqueue([Tokens("", encode(f"{calls_text(call_text(0, '{}'))} STOP")), Hang()])
    message, reason, _ = _whole(url, stop=["STOP"])
    assert (len(message["tool_calls"]), reason) == (1, "tool_calls")
    engine.enqueue([Tokens("", encode(calls_text(call_text(0, '{"a": "STOP"}')))), Hang()])
    message, reason, _ = _whole(url, stop=["STOP"])
    assert (message["tool_calls"], reason) == ([_call(0, '{"a": "')], "stop")


def test_logprobs_are_those_of_the_text(engine: ScriptedEngine, url: str) -> None:
    text = f"<think>ab</think>cd{calls_text(call_text(0, '{}'))}"
    tokens = encode(text)
    scores = [TokenLogprob(-1.0, [])] * len(tokens)
    for ask in (_whole, _streamed):
        engine.enqueue([Tokens("", tokens, scores), finished(len(tokens))])
        if ask is _whole:
            answer = post(url, {**ASK, "logprobs": True}).json()
            scored = answer["choices"][0]["logprobs"]["content"]
        else:
            _, _, events = _streamed(url, logprobs=True)
            scored = [
                entry
                for event in events[:-1]
                for choice in event["choices"]
                for entry in (choice["logprobs"] or {}).get("content", ())
            ]
        assert "".join(entry["token"] for entry in scored) == "cd"


def test_reasoning_is_taken_back_under_either_name() -> None:
    from k2cli.server.dialects.openai_messages import Message

    for name in ("reasoning", "reasoning_content"):
        turn = Message(role="assistant", content="a", **{name: "because"}).for_template()
        assert turn["reasoning_content"] == "because"
    assert (
        "reasoning_content" not in Message(role="user", content="a", reasoning="x").for_template()
    )
