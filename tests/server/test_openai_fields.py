"""Send every field that OpenAI's client offers and compare with docs/reference/api.md."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, get_type_hints

import openai
import pytest
from openai.types import completion_create_params as completion_params
from openai.types.chat import completion_create_params as chat_params

from k2cli.server.dialects.openai_messages import Message
from tests.server.requests import QUESTION, call_text, calls_text, post, prompt_of
from tests.server.scripted import ScriptedEngine

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "reference" / "api.md").read_text()
TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}
# A value other than the default, for fields whose kind alone says what follows.
VALUES: dict[str, Any] = {
    "audio": {"format": "wav", "voice": "alloy"},
    "frequency_penalty": 0.5,
    "function_call": "auto",
    "functions": [{"name": "f"}],
    "logit_bias": {"104": -5},
    "logprobs": True,
    "max_completion_tokens": 9,
    "max_tokens": 9,
    "metadata": {"a": "b"},
    "moderation": {"model": "omni-moderation-latest"},
    "parallel_tool_calls": False,
    "prediction": {"type": "content", "content": "Paris"},
    "presence_penalty": 0.5,
    "prompt_cache_key": "a",
    "prompt_cache_options": {"mode": "explicit"},
    "prompt_cache_retention": "24h",
    "reasoning_effort": "none",
    "response_format": {"type": "json_object"},
    "safety_identifier": "a",
    "seed": 3,
    "service_tier": "flex",
    "stop": ["ris"],
    "store": True,
    "stream": True,
    "stream_options": {"include_usage": True},
    "temperature": 0.5,
    "tools": [TOOL],
    "top_logprobs": 2,
    "top_p": 0.5,
    "user": "someone",
    "verbosity": "low",
    "web_search_options": {},
}
# One that is taken, and one that is refused.
PARTS: dict[str, tuple[Any, Any]] = {
    "best_of": (1, 2),
    "echo": (False, True),
    "messages": (QUESTION, [{"role": "user", "content": [{"type": "image_url"}]}]),
    "modalities": (["text"], ["text", "audio"]),
    "model": ("toy", "gpt-4o"),
    "n": (1, 2),
    "prompt": ("Hello", ["Hello", "there"]),
    "suffix": ("", "!"),
    "tool_choice": ("auto", {"type": "custom", "custom": {"name": "f"}}),
}
NEEDED = {
    "top_logprobs": {"logprobs": True},
    "stream_options": {"stream": True},
    "parallel_tool_calls": {"tools": [TOOL]},
}
ANSWERS = {"parallel_tool_calls": calls_text(call_text(0, "{}"), call_text(1, "{}"))}


def _offered(module: Any, name: str) -> set[str]:
    return set(get_type_hints(getattr(module, name)))


OFFERED = {
    "Chat": _offered(chat_params, "CompletionCreateParamsBase")
    | _offered(chat_params, "CompletionCreateParamsStreaming"),
    "Completions": _offered(completion_params, "CompletionCreateParamsBase")
    | _offered(completion_params, "CompletionCreateParamsStreaming"),
}


def _table(heading: str) -> dict[str, str]:
    section = PAGE.split(f"## {heading}\n", 1)[1].split("\n## ", 1)[0]
    return dict(re.findall(r"^\| `(\w+)` \| (does|part|ignores|refuses) \|", section, re.MULTILINE))


@pytest.fixture
def ask(engine: ScriptedEngine, client: openai.OpenAI) -> Any:
    """Send fields on a route, and return what the client saw and the engine was asked."""

    def send(route: str, fields: dict[str, Any], text: str = "Paris") -> tuple[str, Any]:
        engine._scripts.clear()  # a refused request has left its answer
        engine.answer(text)
        if route == "Chat":
            create: Any = client.chat.completions.create
            answer = create(**{"model": "toy", "messages": QUESTION} | fields)
        else:
            create = client.completions.create
            answer = create(**{"model": "toy", "prompt": "Hello"} | fields)
        if fields.get("stream"):
            seen = f"{[chunk.model_dump(exclude={'id', 'created'}) for chunk in answer]}"
        else:
            seen = f"{answer.model_dump(exclude={'id', 'created'})}"
        request = engine.submitted[-1]
        members = {name: getattr(request, name) for name in request.__struct_fields__}
        return seen, members | {"request_id": ""}

    return send


@pytest.mark.parametrize("route", ["Chat", "Completions"])
def test_each_field_is_honoured_ignored_or_refused_as_documented(route: str, ask: Any) -> None:
    table = _table(route)
    assert set(table) == OFFERED[route]
    for field, kind in table.items():
        needed = NEEDED.get(field, {})
        taken, refused = PARTS[field] if kind == "part" else (VALUES[field], VALUES[field])
        if route == "Completions" and field == "logprobs":
            taken = 2
        if kind != "refuses":
            text = ANSWERS.get(field, "Paris")
            plain = ask(route, needed, text)
            changed = ask(route, needed | {field: taken}, text)
            assert (changed == plain) == (kind in ("ignores", "part")), field
        if kind in ("refuses", "part"):
            with pytest.raises(openai.APIStatusError) as caught:
                ask(route, needed | {field: refused})
            assert caught.value.status_code == (404 if field == "model" else 400), field
            assert field in str(caught.value.param), (field, caught.value.message)


def test_a_field_of_load_programs_changes_nothing(ask: Any) -> None:
    for route in ("Chat", "Completions"):
        assert ask(route, {"extra_body": {"return_token_ids": True}}) == ask(route, {})


def test_an_effort_switches_thinking_where_the_template_can(
    engine: ScriptedEngine, url: str
) -> None:
    def prompt(**fields: Any) -> str:
        engine.answer("ok")
        assert post(url, {"messages": QUESTION, **fields}).status_code == 200
        counted = post(url, {"messages": QUESTION, **fields}, "/v1/tokenize").json()["tokens"]
        assert counted == engine.submitted[-1].prompt
        return prompt_of(engine)

    off = prompt(reasoning_effort="none")
    assert "<thinking=False><enable_thinking=False><reasoning_effort=none>" in off
    high = prompt(reasoning_effort="high", chat_template_kwargs={"thinking": False})
    assert "<thinking=False><enable_thinking=True><reasoning_effort=high>" in high
    # Without an effort; the switches of the servers of Moonshot, Z.ai and Alibaba.
    for switch in ({"thinking": {"type": "disabled"}}, {"enable_thinking": False}):
        assert prompt(**switch) == off
    for switch in ({"thinking": {"type": "enabled"}}, {"enable_thinking": True}):
        assert "<thinking=True><enable_thinking=True>" in prompt(**switch)
    assert prompt(reasoning_effort=None, audio=None, anything=None) == prompt()
    for field in ("reasoning_effort", "verbosity"):
        error = post(url, {"messages": QUESTION, field: "extreme"}).json()["error"]
        assert (error["param"], "'medium'" in error["message"]) == (field, True)


def test_a_template_sees_what_the_model_thought() -> None:
    """Kimi K2 Thinking's puts it before the calls that it has to go on from."""
    turn = Message(role="assistant", content=None, reasoning_content="hm", refusal=None)
    assert turn.for_template() == {"role": "assistant", "content": "", "reasoning_content": "hm"}
