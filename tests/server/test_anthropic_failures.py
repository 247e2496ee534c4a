"""Failures on Anthropic's routes: all of them in Anthropic's form."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import anthropic
import httpx
import pytest

from k2cli.protocol import RequestFailed, Tokens
from k2cli.server import auth
from tests.server.requests import QUESTION, SERVED, encode, post
from tests.server.scripted import EngineUnavailable, ScriptedEngine, serving
from tests.server.test_anthropic import BASE, PATH, events_of

COUNT = f"{PATH}/count_tokens"
LONG = [{"role": "user", "content": "x" * 300}]


def _blocks(*blocks: dict[str, Any], role: str = "user") -> list[dict[str, Any]]:
    return [{"role": role, "content": list(blocks)}]


RESULT: dict[str, Any] = {"type": "tool_result", "tool_use_id": "a"}
CALL: dict[str, Any] = {"type": "tool_use", "id": "a", "name": "f"}
WRONG: list[tuple[dict[str, Any], str]] = [
    ({"messages": []}, "messages: "),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
    ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": ""}]}, "messages: "),
    ({"messages": _blocks({"type": "image", "source": {}})},
     "messages[0].content[0]: a block of type 'image'"),
    ({"messages": _blocks({"type": "document", "source": {}})}, "'document'"),
    ({"messages": _blocks({**RESULT, "content": [{"type": "image"}]})},
     "messages[0].content[0][0]: a block of type 'image'"),
    ({"messages": _blocks({**CALL, "input": {}})}, "message of the assistant"),
    ({"messages": _blocks(RESULT, role="assistant")}, "message of the user"),
    ({"messages": _blocks({"type": "server_tool_use"}, role="assistant")}, "'server_tool_use'"),
    ({"messages": _blocks({**CALL, "input": []}, role="assistant")}, ".input: must be"),
    ({"messages": _blocks({"type": "text"})}, "messages[0].content[0].text: must be a string"),
    ({"messages": LONG}, "prompt is too long: "),
    ({"max_tokens": 0}, "max_tokens"),
    ({"tool_choice": {"type": "best"}}, "tool_choice is of type 'best'"),
    ({"tool_choice": {"type": "tool"}}, "tool_choice.name: must be the name"),
    ({"tools": [{"name": "f", "input_schema": {}, "strict": 1}]}, "tools[0].strict"),
    ({"tools": [{"name": "f"}]}, "tools[0].input_schema"),
    ({"thinking": {"type": "between_tools"}}, "thinking.type"),
    ({"output_config": {"format": {}}}, "output_config.format has no type"),
    ({"output_format": {"type": "json_schema"}}, "output_format.schema: is required"),
    ({"output_config": {"effort": "extreme"}}, "output_config.effort"),
    ({"context_management": {"edits": [{"type": "compact_20260112"}]}}, "context_management.edits"),
    ({"mcp_servers": [{"type": "url"}]}, "mcp_servers"),
    ({"container": "c"}, "'container' is not supported"),
    ({"stop_sequences": [""]}, "stop_sequences[0]"),
    ({"stop_sequences": ["a" * 1025]}, "stop_sequences[0]"),
    ({"messages": _blocks({})}, "messages[0].content[0]: a block without a type"),
    ({"messages": _blocks({**CALL, "name": ""}, role="assistant")}, ".name: must not be empty"),
    ({"tools": [{"name": "", "input_schema": {}}]}, "tools[0].name: must not be empty"),
    ({"context_management": {"edits": [{}]}}, "that has no type"),
    ({"temprature": 1}, "unknown field 'temprature'"),
]  # fmt: skip


def test_wrong_requests_name_the_field_and_reach_no_rank(engine: ScriptedEngine, url: str) -> None:
    for change, part in WRONG:
        for path in (PATH, COUNT):
            if path == COUNT and change.get("messages") is LONG:
                continue  # a prompt that does not fit can be counted
            response = post(url, {**BASE, **change}, path)
            body = response.json()
            assert response.status_code == 400, change
            assert (body["type"], body["error"]["type"]) == ("error", "invalid_request_error")
            assert part in body["error"]["message"], (change, body)
            assert body["request_id"] == response.headers["request-id"]
    assert engine.submitted == []


def test_routes_keys_sizes_and_origins(engine: ScriptedEngine, url: str) -> None:
    def kind(response: httpx.Response, status: int) -> str:
        assert response.status_code == status
        assert response.json()["request_id"] == response.headers["request-id"]
        found: str = response.json()["error"]["type"]
        return found

    version = {"anthropic-version": "2023-06-01"}
    foreign = {"Origin": "https://page.example"}
    assert kind(post(url, {**BASE, "model": "claude"}, PATH), 404) == "not_found_error"
    assert kind(httpx.get(f"{url}{PATH}/batches"), 404) == "not_found_error"
    assert kind(httpx.get(f"{url}/v1/files", headers=version), 404) == "not_found_error"
    assert kind(httpx.get(f"{url}{PATH}"), 405) == "invalid_request_error"
    assert kind(post(url, b"x" * 20_001, PATH), 413) == "request_too_large"
    assert kind(post(url, BASE, PATH, **foreign), 403) == "permission_error"
    assert kind(post(url, b"{", PATH), 400) == "invalid_request_error"
    assert "param" in httpx.get(f"{url}/v1/files").json()["error"]
    with serving(engine, replace(SERVED, api_key="secret")) as locked:
        assert kind(post(locked, BASE, PATH), 401) == "authentication_error"
        assert kind(post(locked, BASE, PATH, **{"x-api-key": "wrong"}), 401)
        assert kind(post(locked, BASE, PATH, **{"x-api-key": ""}), 401)
        assert httpx.get(locked).status_code == 200
        for headers in (
            {"x-api-key": "secret"},
            {"authorization": "Bearer secret"},
            {"x-api-key": "sk-ant-of-the-account", "authorization": "Bearer secret"},
        ):
            engine.answer("Paris")
            assert post(locked, BASE, PATH, **headers).status_code == 200


def test_failures_of_the_engine(
    engine: ScriptedEngine, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(status: int, kind: str) -> None:
        response = post(url, BASE, PATH)
        assert (response.status_code, response.json()["error"]["type"]) == (status, kind)

    engine.enqueue([RequestFailed("", "no room", "capacity")])
    fails(429, "rate_limit_error")
    engine.enqueue([RequestFailed("", "it broke", "internal")])
    fails(500, "api_error")
    engine.enqueue([EngineUnavailable("node b is gone")])
    fails(503, "api_error")
    engine.state, engine.cause = "loading", "the weights are read"
    fails(503, "api_error")
    engine.state = "ready"
    monkeypatch.setattr(auth, "BODIES_HELD", 0)
    fails(529, "overloaded_error")


def test_an_error_in_a_stream_is_an_event(engine: ScriptedEngine, url: str) -> None:
    script: list[Any] = [Tokens("", encode("Par")), 1.5, EngineUnavailable("node b is gone")]
    engine.enqueue(script)
    name, data = events_of(url, BASE)[-1]
    assert (name, data["error"]["type"]) == ("error", "api_error")
    engine.enqueue(script)
    with (
        anthropic.Anthropic(base_url=url, api_key="any", max_retries=0) as client,
        client.messages.stream(model="toy", max_tokens=9, messages=QUESTION) as stream,
        pytest.raises(anthropic.APIStatusError, match="node b is gone"),
    ):
        list(stream)
