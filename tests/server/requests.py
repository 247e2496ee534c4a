"""Requests of the tests of the HTTP API."""

from __future__ import annotations

import json
from typing import Any

import httpx

from k2cli.server.output.output_format import choose_output_format
from k2cli.server.served_model import ServedModel
from tests.server.scripted import LetterTokenizer, ScriptedEngine

# Letters are the tokens of these tests, so the markers are ordinary text.
K2_FORMAT = choose_output_format(None, {}, lambda text: None, "kimi_k2", "think")
SERVED = ServedModel(
    "toy",
    context_length=200,
    created=1_700_000_000,
    max_body_bytes=20_000,
    output_format=K2_FORMAT,
)
QUESTION: list[Any] = [{"role": "user", "content": "Capital of France?"}]
CHAT = "/v1/chat/completions"


def encode(text: str) -> list[int]:
    return LetterTokenizer().encode(text)


def prompt_of(engine: ScriptedEngine) -> str:
    return LetterTokenizer().decode(engine.submitted[-1].prompt)


def post(url: str, body: Any, path: str = CHAT, **headers: str) -> httpx.Response:
    content = body if isinstance(body, bytes | str) else json.dumps(body)
    headers = {"Content-Type": "application/json", **headers}
    # Not one certificate is needed, and reading all of them takes 25 ms of CPU.
    return httpx.post(f"{url}{path}", content=content, headers=headers, timeout=10, verify=False)


def call_text(index: int, arguments: str, name: str = "f") -> str:
    """A call as K2 writes it."""
    return (
        f"<|tool_call_begin|>functions.{name}:{index}<|tool_call_argument_begin|>{arguments}"
        "<|tool_call_end|>"
    )


def calls_text(*calls: str) -> str:
    """The part of an answer of K2 that has its calls."""
    return f"<|tool_calls_section_begin|>{''.join(calls)}<|tool_calls_section_end|>"


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
