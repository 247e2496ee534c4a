"""The OpenAPI document: current, valid, complete, and true of real answers."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import pytest
from openapi_spec_validator import validate

from k2cli.protocol import RequestFailed, TokenLogprob, Tokens
from k2cli.server.app import create_app
from k2cli.server.openapi.document import openapi_document
from k2cli.server.served_model import ServedModel
from tests.server.requests import K2_FORMAT
from tests.server.scripted import LetterTokenizer, ScriptedEngine, finished, serving

ROOT = Path(__file__).resolve().parents[2]
DOCUMENT = openapi_document()
TOOL = {"name": "f", "parameters": {"type": "object"}}
CALL = (
    "<|tool_calls_section_begin|><|tool_call_begin|>functions.f:0<|tool_call_argument_begin|>"
    '{"a": 1}<|tool_call_end|><|tool_calls_section_end|>'
)
ASK: dict[str, Any] = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 300}


def test_the_committed_file_is_current() -> None:
    command = [sys.executable, "scripts/openapi", "--check"]
    assert subprocess.run(command, cwd=ROOT, timeout=60).returncode == 0, "run scripts/openapi"


def test_the_document_is_valid() -> None:
    validate(DOCUMENT)


def test_every_route_is_described() -> None:
    app = create_app(ScriptedEngine(), LetterTokenizer(), ServedModel("m", 500), None)  # type: ignore[arg-type]
    routes = {
        (method.lower(), route.path.replace(":path", ""))
        for route in app.routes
        for method in route.methods or ()  # type: ignore[attr-defined]
    }
    described = {(method, path) for path, item in DOCUMENT["paths"].items() for method in item}
    assert {each for each in routes if each[0] != "head"} == described


def test_null_stands_for_absent_where_a_body_allows_it() -> None:
    schemas = DOCUMENT["components"]["schemas"]
    for name in ("ChatCompletionBody", "MessagesBody", "ResponsesBody", "TokenizeBody"):
        required = schemas[name].get("required", ())
        for member, schema in schemas[name]["properties"].items():
            whole = {**schema, "components": DOCUMENT["components"]}
            allows_null = jsonschema.Draft202012Validator(whole).is_valid(None)
            assert allows_null == (member not in required), (name, member)


@pytest.fixture
def engine() -> ScriptedEngine:
    return ScriptedEngine()


@pytest.fixture
def client(engine: ScriptedEngine) -> Iterator[httpx.Client]:
    served = ServedModel("m", 500, output_format=K2_FORMAT, api_key="s3cret")
    with (
        serving(engine, served) as url,
        httpx.Client(base_url=url, headers={"x-api-key": "s3cret"}) as client,
    ):
        yield client


def conforms(answer: httpx.Response, path: str) -> None:
    """Check an answer against the document."""
    item = DOCUMENT["paths"][path][answer.request.method.lower()]
    response = item["responses"][str(answer.status_code)]
    schema = response["content"][answer.headers["content-type"].partition(";")[0]]["schema"]
    whole = {**schema, "components": DOCUMENT["components"]}
    jsonschema.Draft202012Validator(whole).validate(answer.json())


def test_it_is_served_without_a_key(client: httpx.Client) -> None:
    answer = client.get("/openapi.json", headers={"x-api-key": ""})
    assert answer.json() == DOCUMENT
    refused = client.get("/v1/models", headers={"x-api-key": ""})
    assert refused.status_code == 401
    conforms(refused, "/v1/models")


def test_answers_conform(engine: ScriptedEngine, client: httpx.Client) -> None:
    said = f"<think>hm</think>Yes.{CALL}"
    chat_tool = {"type": "function", "function": TOOL}
    requests: list[tuple[str, dict[str, Any]]] = [
        ("/v1/chat/completions", {**ASK, "tools": [chat_tool]}),
        ("/v1/chat/completions", {**ASK, "max_tokens": 10_000}),
        ("/v1/responses", {"input": "x", "tools": [{"type": "function", **TOOL}]}),
        ("/v1/messages", {**ASK, "tools": [{"name": "f", "input_schema": {"type": "object"}}]}),
        ("/v1/completions", {"prompt": "x"}),
    ]
    for path, body in requests:
        engine.answer(said)
        answer = client.post(path, json=body)
        assert answer.status_code == 200, answer.text
        assert "Yes." in answer.text
        conforms(answer, path)
    for path, body in [
        ("/v1/tokenize", {"prompt": "x"}),
        ("/v1/messages/count_tokens", {"messages": ASK["messages"]}),
    ]:
        conforms(client.post(path, json=body), path)
    for headers in ({}, {"anthropic-version": "2023-06-01"}):
        conforms(client.get("/v1/models", headers=headers), "/v1/models")
        conforms(client.get("/v1/models/m", headers=headers), "/v1/models/{name}")
    for path in ("/health", "/", "/v1/status"):
        conforms(client.get(path), path)


def test_failures_conform(engine: ScriptedEngine, client: httpx.Client) -> None:
    for path in ("/v1/chat/completions", "/v1/messages"):
        engine.enqueue([RequestFailed("", "too many", kind="capacity")])
        engine.enqueue([RequestFailed("", "a fault", kind="internal")])
        answers = [client.post(path, json=ASK) for _ in range(2)]
        answers += [
            client.post(path, json={**ASK, **wrong})
            for wrong in ({"model": "other"}, {"temperature": 9}, {"nonsense": 1}, {"thread": {}})
        ]
        engine.state = "failed"
        answers.append(client.post(path, json=ASK))
        engine.state = "ready"
        assert [each.status_code for each in answers] == [429, 500, 404, 400, 400, 400, 503]
        for answer in answers:
            conforms(answer, path)
    conforms(client.post("/v1/embeddings", json={"input": "x"}), "/v1/embeddings")
    engine.state, engine.cause = "failed", "a rank was lost"
    health = client.get("/health")
    assert health.status_code == 503
    conforms(health, "/health")


def test_a_scored_answer_conforms(engine: ScriptedEngine, client: httpx.Client) -> None:
    scores = [TokenLogprob(-0.5, [(65, -0.5), (66, -1.0)])]
    for path, body in [
        ("/v1/chat/completions", {**ASK, "logprobs": True, "top_logprobs": 2}),
        ("/v1/completions", {"prompt": "x", "logprobs": 2}),
    ]:
        engine.enqueue([Tokens("", [65], scores), finished(1)])
        answer = client.post(path, json=body)
        assert "top_logprobs" in answer.text
        conforms(answer, path)


@pytest.mark.parametrize("choice", ["function", "allowed_tools", "any", 1, [], {}])
def test_a_choice_of_tools_of_no_known_form_is_refused(client: httpx.Client, choice: Any) -> None:
    tools = [{"type": "function", "function": TOOL}]
    for path, body in (("/v1/chat/completions", ASK), ("/v1/responses", {"input": "x"})):
        answer = client.post(path, json={**body, "tools": tools, "tool_choice": choice})
        assert answer.status_code == 400, answer.text
        assert answer.json()["error"]["param"].startswith(("tool_choice", "tools"))
