"""OpenAI's Responses API: items in, items out, through the openai client and raw events."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_type_hints

import httpx
import openai
import pytest
from openai.types.responses import response_create_params

from k2cli.protocol import PromptProgress, RequestFailed, Tokens
from k2cli.server.dialects.responses_conversation import responses_conversation
from k2cli.server.dialects.responses_schemas import ResponsesBody
from k2cli.server.dialects.shared_fields import log_left_out
from tests.server.requests import call_text, calls_text, encode, post, prompt_of
from tests.server.scripted import ScriptedEngine
from tests.server.test_openai_fields import _table

PATH = "/v1/responses"
CODEX = Path(__file__).resolve().parents[1] / "data" / "agents" / "codex.json"
TOOL: dict[str, Any] = {"type": "function", "name": "f", "parameters": {"type": "object"}}
SPACE: dict[str, Any] = {"type": "namespace", "name": "agents", "tools": [{**TOOL, "name": "g"}]}
THOUGHT = "Two files."
ARGUMENTS = '{"path":  "é.py"}'
ANSWER = (
    f"<think>{THOUGHT}</think>Let me look. "
    + calls_text(call_text(0, ARGUMENTS), call_text(1, "{}", "g"))
)  # fmt: skip
ASK: dict[str, Any] = {"model": "toy", "input": "Hi", "tools": [TOOL, SPACE]}


@pytest.fixture
def responses(url: str) -> Iterator[Any]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0, timeout=10) as client:
        yield client.responses


def _check(output: list[Any]) -> None:
    reasoning, message, first, second = output
    assert (reasoning.type, reasoning.content[0].text) == ("reasoning", THOUGHT)
    assert message.content[0].text == "Let me look. "
    assert (first.call_id, first.name, first.arguments) == ("functions.f:0", "f", ARGUMENTS)
    assert (first.namespace, second.name, second.namespace) == (None, "g", "agents")
    assert {item.status for item in output} == {"completed"}
    assert len({item.id for item in output}) == 4


def test_a_whole_answer_has_an_item_for_each_part(engine: ScriptedEngine, responses: Any) -> None:
    engine.answer(ANSWER)
    answer = responses.create(**ASK)
    _check(answer.output)
    assert (answer.status, answer.output_text) == ("completed", "Let me look. ")
    assert answer.usage.output_tokens_details.reasoning_tokens > 0
    assert answer.usage.total_tokens == answer.usage.input_tokens + answer.usage.output_tokens


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_a_stream_builds_the_same_items(engine: ScriptedEngine, responses: Any, size: int) -> None:
    engine.answer(ANSWER, size=size)
    with responses.stream(**ASK) as stream:
        events = list(stream)
        final = stream.get_final_response()
    _check(final.output)
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type for event in events]
    assert kinds[:2] == ["response.created", "response.in_progress"]
    assert kinds[-1] == "response.completed"
    done = [event.item for event in events if event.type == "response.output_item.done"]
    assert [item.id for item in done] == [item.id for item in final.output]
    assert [item.status for item in done] == ["completed"] * 4
    for delta, whole in (
        ("response.output_text", "Let me look. "),
        ("response.reasoning_text", THOUGHT),
    ):
        pieces = [event.delta for event in events if event.type == f"{delta}.delta"]
        (text,) = [event.text for event in events if event.type == f"{delta}.done"]
        assert "".join(pieces) == text == whole


def test_an_answer_that_is_cut_off_is_incomplete(engine: ScriptedEngine, responses: Any) -> None:
    begun = "<|tool_calls_section_begin|>" + call_text(0, '{"path": "a').split("<|tool_call_end")[0]
    for stream in (False, True):
        engine.answer(begun, reason="length")
        answer = responses.create(**ASK, stream=stream)
        if stream:
            last = list(answer)[-1]
            assert last.type == "response.incomplete"
            answer = last.response
        assert answer.status == "incomplete"
        assert answer.incomplete_details.reason == "max_output_tokens"
        (call,) = answer.output
        assert (call.status, call.arguments) == ("incomplete", '{"path": "a')


def test_white_space_alone_is_no_item(engine: ScriptedEngine, responses: Any) -> None:
    text = "<think>\n</think>\n\n" + calls_text(call_text(0, "{}"))
    engine.answer(text)
    assert [item.type for item in responses.create(**ASK).output] == ["function_call"]
    engine.answer(text)
    last = list(responses.create(**ASK, stream=True))[-1]
    assert [item.type for item in last.response.output] == ["function_call"]


def test_a_loop_of_tools_gives_back_the_model_s_own_turn(
    engine: ScriptedEngine, responses: Any
) -> None:
    engine.answer(ANSWER)
    first = responses.create(**ASK)
    results: list[Any] = [
        {"type": "function_call_output", "call_id": item.call_id, "output": "done"}
        for item in first.output
        if item.type == "function_call"
    ]
    history: Any = [{"role": "user", "content": "Hi"}, *first.output, *results]
    body = ResponsesBody.model_validate(
        {"input": json.loads(json.dumps([_plain(item) for item in history]))}
    )
    assert responses_conversation(body).turns == [
        {"role": "user", "content": "Hi"},
        {
            "role": "assistant",
            "content": "Let me look. ",
            "reasoning_content": THOUGHT,
            "tool_calls": [
                {
                    "id": f"functions.{name}:{index}",
                    "type": "function",
                    "function": {"name": name, "arguments": arguments},
                }
                for index, (name, arguments) in enumerate([("f", ARGUMENTS), ("g", "{}")])
            ],
        },
        {"role": "tool", "tool_call_id": "functions.f:0", "content": "done"},
        {"role": "tool", "tool_call_id": "functions.g:1", "content": "done"},
    ]
    engine.answer("Good.")
    assert responses.create(**{**ASK, "input": history}).output_text == "Good."


@pytest.mark.parametrize(
    "answer",
    [
        calls_text(call_text(0, "{}")),
        calls_text(call_text(0, "")),
        calls_text(call_text(0, "")).partition("<|tool_call_end|>")[0],
    ],
)
def test_the_deltas_of_a_call_are_its_arguments(
    engine: ScriptedEngine, responses: Any, answer: str
) -> None:
    """Also of one without arguments, and of one that the model did not end."""
    engine.answer(answer)
    with responses.stream(**ASK) as stream:
        events = list(stream)
    sent = "".join(e.delta for e in events if e.type == "response.function_call_arguments.delta")
    (done,) = [e.arguments for e in events if e.type == "response.function_call_arguments.done"]
    engine.answer(answer)
    (call,) = responses.create(**ASK).output
    assert (sent, done, call.arguments) == ("{}", "{}", "{}")


def _plain(item: Any) -> Any:
    return item if isinstance(item, dict) else item.to_dict()


def test_codex_is_understood_in_both_turns(caplog: pytest.LogCaptureFixture) -> None:
    first, second = (one["body"] for one in json.loads(CODEX.read_text())["requests"])
    log_left_out.cache_clear()
    conversation = responses_conversation(ResponsesBody.model_validate(second))
    assert [turn["role"] for turn in conversation.turns] == [
        "system", "system", "user", "user", "assistant", "tool",
    ]  # fmt: skip
    names = [tool["function"]["name"] for tool in conversation.tools or []]
    assert {"exec_command", "spawn_agent"} <= set(names)
    assert "web_search" not in names
    assert [record.levelname for record in caplog.records] == ["WARNING"]  # the log has these
    assert "'web_search'" in caplog.text
    assert conversation.namespaces["spawn_agent"] == "multi_agent_v1"
    begun = responses_conversation(ResponsesBody.model_validate(first))
    assert list(conversation.turns[: len(begun.turns)]) == list(begun.turns)
    assert begun.tools == conversation.tools


@pytest.mark.parametrize(
    ("input_", "named"),
    [
        ([{"role": "user", "content": [{"type": "input_image"}]}], "input[0].content[0]"),
        ([{"role": "critic", "content": "a"}], "input[0].role"),
        ([{"type": "item_reference", "id": "msg_1"}], "input[0]"),
        ([{"type": "web_search_call"}], "input[0].type"),
        ([{"type": "function_call", "call_id": "a", "name": 3}], "input[0].name"),
        ([{"type": "function_call_output", "output": "a"}], "input[0].call_id"),
        ([{"type": "reasoning", "content": "a"}], "input[0].content"),
        ([], "input"),
    ],
)  # fmt: skip
def test_items_that_cannot_be_translated_are_named(url: str, input_: Any, named: str) -> None:
    answer = post(url, {"input": input_}, PATH)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == named


def test_two_functions_of_one_name_are_refused(url: str) -> None:
    answer = post(url, {"input": "Hi", "tools": [TOOL, {**SPACE, "tools": [TOOL]}]}, PATH)
    assert answer.status_code == 400
    assert "two functions 'f'" in answer.json()["error"]["message"]


def test_an_answer_that_fails_in_a_stream_ends_with_failed(
    engine: ScriptedEngine, url: str
) -> None:
    begun = [PromptProgress("", 1, 5, 0), Tokens("", encode("Par"))]
    engine.enqueue([*begun, RequestFailed("", "boom")])
    with httpx.stream("POST", f"{url}{PATH}", json={"input": "Hi", "stream": True}) as stream:
        lines = list(stream.iter_lines())
    assert stream.status_code == 200
    last = [json.loads(line[6:]) for line in lines if line.startswith("data: ")][-1]
    assert (last["type"], last["response"]["status"]) == ("response.failed", "failed")
    assert "boom" in last["response"]["error"]["message"]


# --- the table of docs/reference/api.md -----------------------------------------------------------

VALUES: dict[str, Any] = {
    "background": (False, True),
    "instructions": "Be brief.",
    "input": ("Hi", [{"type": "item_reference", "id": "a"}]),
    "max_output_tokens": 9,
    "model": ("toy", "gpt-4o"),
    "parallel_tool_calls": False,
    "reasoning": ({"summary": "auto"}, {"mode": "pro"}),
    "stream": True,
    "temperature": 0.5,
    "text": {"format": {"type": "json_object"}},
    "tool_choice": ("auto", {"type": "web_search"}),
    "tools": [TOOL],
    "top_logprobs": (0, 3),
    "top_p": 0.5,
    "truncation": ("disabled", "auto"),
}


def test_each_field_is_honoured_ignored_or_refused_as_documented(
    engine: ScriptedEngine, url: str
) -> None:
    table = _table("Responses")
    hints = get_type_hints(response_create_params.ResponseCreateParamsBase)
    assert set(table) == {*hints, "stream", "client_metadata"}
    for field, kind in table.items():
        value = VALUES.get(field, "a")
        taken, refused = value if kind == "part" else (value, value)
        if kind != "refuses":
            engine._scripts.clear()
            engine.answer("Paris")
            answer = post(url, {"input": "Hi", field: taken}, PATH)
            assert answer.status_code == 200, (field, answer.text)
        if kind in ("refuses", "part"):
            answer = post(url, {"input": "Hi", field: refused}, PATH)
            assert answer.status_code == (404 if field == "model" else 400), (field, answer.text)
            assert field in str(answer.json()["error"]["param"]), (field, answer.text)


def test_instructions_and_effort_reach_the_template(engine: ScriptedEngine, url: str) -> None:
    engine.answer("Paris")
    post(url, {"input": "Hi", "instructions": "Be brief."}, PATH)
    assert "Be brief." in prompt_of(engine)
    body = ResponsesBody.model_validate({"input": "Hi", "reasoning": {"effort": "none"}})
    assert responses_conversation(body).variables["thinking"] is False
