"""Requests of Anthropic's API: what reaches the chat template."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from k2cli.server.client_request import Conversation
from k2cli.server.dialects.anthropic_conversation import anthropic_conversation
from k2cli.server.dialects.anthropic_ids import client_id, model_id
from k2cli.server.dialects.anthropic_schemas import MessagesBody
from k2cli.server.dialects.shared_fields import log_left_out

DATA = Path(__file__).resolve().parents[1] / "data"
BILLING = "x-anthropic-billing-header: cc_version=2.1.177.01c; cc_entrypoint=cli; cch=36ee5;"
REQUEST = "1f0c9a72" + "0" * 24


def _read(normalizes: bool = True, **fields: Any) -> Conversation:
    body = {"max_tokens": 9, "messages": [{"role": "user", "content": "Hi"}], **fields}
    return anthropic_conversation(MessagesBody.model_validate(body), normalizes)


def _text(text: str, **members: Any) -> dict[str, Any]:
    return {"type": "text", "text": text, "cache_control": {"type": "ephemeral"}, **members}


def _turns(*messages: tuple[str, Any]) -> list[dict[str, Any]]:
    read = _read(messages=[{"role": role, "content": content} for role, content in messages])
    return list(read.turns)


def test_results_of_tools_are_turns_before_the_text_beside_them() -> None:
    call = client_id("functions.Read:0", REQUEST)
    other = client_id("functions.Read:1", REQUEST)
    assert _turns(
        ("user", [_text("<system-reminder>"), _text("Fix it")]),
        ("assistant", [
            {"type": "thinking", "thinking": "Look at both", "signature": "any"},
            {"type": "redacted_thinking", "data": "xyz"},
            _text("I "), _text("look."),
            {"type": "tool_use", "id": call, "name": "Read", "input": {"path": "é.py"}},
            {"type": "tool_use", "id": other, "name": "Read", "input": {}},
        ]),
        ("user", [
            {"type": "tool_result", "tool_use_id": other, "is_error": True, "content": "no file"},
            _text("Go on"),
            {"type": "tool_result", "tool_use_id": call, "content": [_text("a"), _text("b")]},
        ]),
        ("system", "It is late"),
        ("assistant", "Well,"),
    ) == [
        {"role": "user", "content": "<system-reminder>\n\nFix it"},
        {
            "role": "assistant",
            "content": "I look.",
            "reasoning_content": "Look at both",
            "tool_calls": [
                {"id": "functions.Read:0", "type": "function",
                 "function": {"name": "Read", "arguments": '{"path": "é.py"}'}},
                {"id": "functions.Read:1", "type": "function",
                 "function": {"name": "Read", "arguments": "{}"}},
            ],
        },
        {"role": "tool", "content": "Error: no file", "tool_call_id": "functions.Read:1",
         "name": "Read"},
        {"role": "tool", "content": "a\n\nb", "tool_call_id": "functions.Read:0", "name": "Read"},
        {"role": "user", "content": "Go on"},
        {"role": "system", "content": "It is late"},
        {"role": "assistant", "content": "Well,"},
    ]  # fmt: skip


def test_consecutive_messages_of_a_role_are_one_turn() -> None:
    result = {"type": "tool_result", "tool_use_id": "a", "is_error": True}
    said = {**result, "content": "<tool_use_error>no</tool_use_error>"}
    assert _turns(("user", "A"), ("user", [said]), ("user", [_text("B"), _text("")])) == [
        {"role": "tool", "content": "<tool_use_error>no</tool_use_error>", "tool_call_id": "a"},
        {"role": "user", "content": "A\n\nB"},
    ]


def test_a_system_message_may_end_with_the_next_message_of_the_user() -> None:
    once = {"role": "system", "content": "once", "clear_at": "next_user_message"}
    user = {"role": "user", "content": "Hi"}
    assert [turn["content"] for turn in _read(messages=[user, once]).turns] == ["Hi", "once"]
    assert [turn["content"] for turn in _read(messages=[user, once, user]).turns] == ["Hi\n\nHi"]


class _Visits(list[Any]):
    """List that counts the members that are looked at."""

    count = 0

    def __iter__(self) -> Iterator[Any]:
        for member in super().__iter__():
            self.count += 1
            yield member

    def __getitem__(self, index: Any) -> Any:
        found = super().__getitem__(index)
        self.count += len(found) if isinstance(index, slice) else 1
        return found


def test_messages_that_end_cost_no_search_through_the_later_ones() -> None:
    # 16,000 of them in 1.1 MB took a minute.
    once = {"role": "system", "content": "once", "clear_at": "next_user_message"}
    body = MessagesBody(messages=[{"role": "user", "content": "a"}, *[once] * 200])
    messages = _Visits(body.messages)
    anthropic_conversation(body.model_copy(update={"messages": messages}), True)
    assert messages.count < 5 * len(messages)


@pytest.mark.parametrize(
    ("system", "shown"),
    [
        ([_text(BILLING), _text("You are Claude Code"), _text("Be brief")],
         "You are Claude Code\n\nBe brief"),
        ([_text(f"{BILLING}\nBe brief")], "Be brief"),
        (f"{BILLING}\n\nBe brief", "Be brief"),
        (f"Quote: {BILLING}", f"Quote: {BILLING}"),
        ([_text(BILLING)], None),
        ("", None),
    ],
)  # fmt: skip
def test_the_billing_header_is_dropped(system: Any, shown: str | None) -> None:
    turns = _read(system=system).turns
    assert (turns[0]["content"] if len(turns) == 2 else None) == shown


def test_the_billing_header_can_be_kept_and_is_kept_in_messages() -> None:
    kept = _read(normalizes=False, system=[_text(BILLING), _text("Be brief")]).turns
    assert kept[0]["content"] == f"{BILLING}\n\nBe brief"
    assert _turns(("user", BILLING))[0]["content"] == BILLING


def test_tools_with_a_schema_are_offered_and_those_of_servers_are_not(
    caplog: pytest.LogCaptureFixture,
) -> None:
    schema = {"type": "object", "properties": {}}
    tools: list[dict[str, Any]] = [
        {"name": "Read", "description": "Reads", "input_schema": schema, "strict": True},
        {"type": "custom", "name": "f", "input_schema": schema, "input_examples": [{"a": 1}]},
        {"type": "web_search_20250305", "name": "web_search", "max_uses": 8},
        {"type": "bash_20250124", "name": "bash"},
    ]
    log_left_out.cache_clear()
    with caplog.at_level(logging.WARNING):
        read = _read(tools=tools)
        _read(tools=tools)
    assert read.tools == [
        {"type": "function", "function":
            {"name": "Read", "description": "Reads", "parameters": schema, "strict": True}},
        {"type": "function", "function":
            {"name": "f", "parameters": {**schema, "examples": [{"a": 1}]}}},
    ]  # fmt: skip
    (line,) = caplog.messages
    assert "'bash_20250124', 'web_search_20250305'" in line
    assert _read(tools=tools, tool_choice={"type": "none"}).tools is None


@pytest.mark.parametrize(
    ("fields", "variables"),
    [
        ({}, {}),
        ({"thinking": {"type": "disabled"}, "output_config": {"effort": "high"}},
         {"thinking": False, "enable_thinking": False, "reasoning_effort": "none"}),
        ({"thinking": {"type": "enabled", "budget_tokens": 1024}},
         {"thinking": True, "enable_thinking": True}),
        ({"thinking": {"type": "adaptive", "display": "omitted"},
          "output_config": {"effort": "max"}},
         {"thinking": True, "enable_thinking": True, "reasoning_effort": "max"}),
    ],
)  # fmt: skip
def test_thinking_and_effort_are_variables_of_the_template(
    fields: dict[str, Any], variables: dict[str, Any]
) -> None:
    assert _read(**fields).variables == variables


def test_options_of_the_answer() -> None:
    choice = {"type": "auto", "disable_parallel_tool_use": True}
    body = {"messages": [{"role": "user", "content": "Hi"}], "tool_choice": choice}
    assert MessagesBody.model_validate(body).answer_options.parallel_calls is False
    assert MessagesBody.model_validate({**body, "tool_choice": None}).answer_options.parallel_calls


@pytest.mark.parametrize(
    "written",
    [
        "functions.mcp__server__do_it:12",
        "functions.a_3_b:0",
        "call_8f3",
        "functions.é x:1",
        "",
        "a.b",
    ],
)
def test_ids_of_calls_suit_clients_and_come_back(written: str) -> None:
    made = client_id(written, REQUEST)
    assert made.isascii()
    assert made.replace("_", "").replace("-", "").isalnum()
    assert model_id(made) == written


def test_foreign_ids_are_kept() -> None:
    for foreign in ("toolu_01D7FLrfh4GYq7yT1ULFeyMV", "toolu_hex_zz", "toolu_hex_ff"):
        assert model_id(foreign) == foreign
    assert client_id("functions.f:0", REQUEST) != client_id("functions.f:0", "0" * 32)


def test_the_requests_of_claude_code_share_their_beginning() -> None:
    """Turn 2 has the first turn's system message in another form, and the same prompt."""
    recorded = json.loads((DATA / "agents" / "claude.json").read_text())["requests"]
    bodies = [each["body"] for each in recorded if each["path"].startswith("/v1/messages")]
    first, second = (
        anthropic_conversation(MessagesBody.model_validate(body), True) for body in bodies
    )
    assert BILLING.partition(" ")[0] in bodies[0]["system"][0]["text"]
    assert BILLING.partition(" ")[0] not in first.turns[0]["content"]
    assert [turn["role"] for turn in second.turns] == [
        "system", "user", "system", "assistant", "tool",
    ]  # fmt: skip
    assert list(second.turns[:3]) == list(first.turns)
    assert second.tools == first.tools
    assert len(first.tools or []) == len(bodies[0]["tools"])
    assert second.turns[3]["reasoning_content"]
    call = second.turns[3]["tool_calls"][0]
    assert second.turns[4]["tool_call_id"] == call["id"]
