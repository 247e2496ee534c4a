"""Structured output as clients of each dialect ask for it, and the clients' own helpers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, Literal

import anthropic
import openai
import pytest
from pydantic import BaseModel

from k2cli.protocol import Grammar
from tests.server.requests import CHAT, QUESTION, call_text, calls_text, post, prompt_of
from tests.server.scripted import ScriptedEngine
from tests.server.structured.matching import bytes_only

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"type": "string"}},
    "required": ["city"],
    "additionalProperties": False,
}
RIGHT, WRONG = '{"city": "Paris"}', '{"town": "Paris"}'
COMPLETIONS, RESPONSES, MESSAGES = "/v1/completions", "/v1/responses", "/v1/messages"
PROMPTS: dict[str, dict[str, Any]] = {
    CHAT: {"messages": QUESTION},
    COMPLETIONS: {"prompt": "Hello"},
    RESPONSES: {"input": "Hello"},
    MESSAGES: {"messages": QUESTION},
}
NAMED = {"name": "answer", "schema": SCHEMA, "strict": True, "description": "a city"}
LARK, GBNF = 'start: "Paris" | "Rome"', 'root ::= "Paris" | "Rome"'


def chat_tool(name: str = "f", **more: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": SCHEMA, **more}}


@pytest.fixture
def asked(engine: ScriptedEngine, url: str) -> Any:
    """Send a request, and return the grammar that the engine was asked to obey."""

    def ask(path: str, fields: dict[str, Any]) -> Grammar | None:
        engine._scripts.clear()
        engine.answer(RIGHT)
        response = post(url, PROMPTS[path] | fields, path)
        assert response.status_code == 200, response.text
        return engine.submitted[-1].grammar

    return ask


@pytest.fixture
def claude(url: str) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=url, api_key="any", max_retries=0, timeout=10) as client:
        yield client


FORMATS: list[tuple[str, dict[str, Any], str, str]] = [
    (CHAT, {"response_format": {"type": "json_object"}}, WRONG, "[1]"),
    (CHAT, {"response_format": {"type": "json_object", "schema": SCHEMA}}, RIGHT, WRONG),
    (CHAT, {"response_format": {"type": "json_schema", "json_schema": NAMED}}, RIGHT, WRONG),
    (CHAT, {"response_format": {"type": "json_schema", "schema": SCHEMA}}, RIGHT, WRONG),
    (CHAT, {"response_format": {"type": "regex", "regex": "[A-Z][a-z]+"}}, "Paris", "paris"),
    (CHAT, {"response_format": {"type": "grammar", "grammar": LARK}}, "Rome", "London"),
    (CHAT, {"response_format": {"type": "grammar", "grammar": GBNF, "syntax": "gbnf"}}, "Rome", ""),
    (CHAT, {"structured_outputs": {"json": SCHEMA, "regex": None}}, RIGHT, WRONG),
    (CHAT, {"structured_outputs": {"json": json.dumps(SCHEMA)}}, RIGHT, WRONG),
    (CHAT, {"structured_outputs": {"regex": "a+", "json_object": False}}, "aa", "ab"),
    (CHAT, {"structured_outputs": {"choice": ["ja", "nein"]}}, "nein", "no"),
    (CHAT, {"structured_outputs": {"grammar": LARK}}, "Rome", "London"),
    (CHAT, {"structured_outputs": {"json_object": True}}, WRONG, "[]"),
    (CHAT, {"guided_json": SCHEMA}, RIGHT, WRONG),
    (CHAT, {"guided_regex": "a+"}, "aa", "ab"),
    (CHAT, {"guided_choice": ["ja", "nein"]}, "ja", "no"),
    (CHAT, {"guided_grammar": GBNF}, "Paris", "x"),
    (CHAT, {"grammar": GBNF}, "Paris", "x"),
    (CHAT, {"json_schema": SCHEMA}, RIGHT, WRONG),
    (COMPLETIONS, {"response_format": {"type": "json_schema", "json_schema": NAMED}}, RIGHT, WRONG),
    (COMPLETIONS, {"structured_outputs": {"regex": "a+"}}, "aa", "<think></think>aa"),
    (COMPLETIONS, {"grammar": GBNF}, "Paris", "x"),
    (RESPONSES, {"text": {"format": {"type": "json_object"}}}, WRONG, "[1]"),
    (RESPONSES, {"text": {"format": {"type": "json_schema", **NAMED}}}, RIGHT, WRONG),
    (MESSAGES, {"output_config": {"format": {"type": "json_schema", "schema": SCHEMA}}}, RIGHT,
     WRONG),
    (MESSAGES, {"output_format": {"type": "json_schema", "schema": SCHEMA}}, RIGHT, WRONG),
]  # fmt: skip


@pytest.mark.parametrize(("path", "fields", "right", "wrong"), FORMATS)
def test_formats_of_each_dialect(
    path: str, fields: dict[str, Any], right: str, wrong: str, asked: Any
) -> None:
    grammar = asked(path, fields)
    accepts = bytes_only().accepts
    assert accepts(grammar.text, right)
    assert not accepts(grammar.text, wrong)
    if path != COMPLETIONS:
        assert accepts(grammar.text, f"<think>Hm.</think>{right}")


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        (CHAT, {"response_format": {"type": "text"}}),
        (CHAT, {"structured_outputs": {}, "tools": [chat_tool()], "tool_choice": "auto"}),
        (CHAT, {"tools": [chat_tool(strict=True)], "tool_choice": "none"}),
        (RESPONSES, {"text": {"format": {"type": "text"}}, "tool_choice": "none"}),
        (MESSAGES, {"output_config": {"format": None, "effort": "high"}}),
    ],
)
def test_without_a_wish_the_answer_is_free(path: str, fields: dict[str, Any], asked: Any) -> None:
    assert asked(path, fields) is None


def messages_tool(**more: Any) -> dict[str, Any]:
    return {"name": "f", "input_schema": SCHEMA, **more}


F_TOOL = {"type": "function", "function": {"name": "f"}}
TWO_CHAT = {"tools": [chat_tool(), chat_tool("g")]}
TWO_RESPONSES = {
    "tools": [
        {"type": "web_search"},
        {"type": "function", "name": "f", "parameters": SCHEMA},
        {"type": "namespace", "name": "n", "tools": [{"type": "function", "name": "g"}]},
    ]
}
F, G = (calls_text(call_text(0, RIGHT, name)) for name in "fg")
FF = calls_text(call_text(0, RIGHT), call_text(1, RIGHT))
CHOICES: list[tuple[str, dict[str, Any], list[str], list[str]]] = [
    (CHAT, TWO_CHAT | {"tool_choice": "required"}, [F, G, FF], ["", "Hi"]),
    (CHAT, TWO_CHAT | {"tool_choice": "required", "parallel_tool_calls": False}, [F], [FF]),
    (CHAT, TWO_CHAT | {"tool_choice": F_TOOL}, [F], [G, FF, "Hi"]),
    (CHAT, TWO_CHAT | {"tool_choice": {"type": "function", "name": "f"}}, [F], [G]),
    (CHAT, TWO_CHAT | {"tool_choice": {"type": "allowed_tools", "allowed_tools": {
        "mode": "required", "tools": [F_TOOL]}}}, [F], [G, "Hi"]),
    (CHAT, {"tools": [chat_tool(strict=True)]}, [F, "Hi"], [F.replace("city", "town")]),
    (RESPONSES, TWO_RESPONSES | {"tool_choice": "required"}, [F, G], ["Hi"]),
    (RESPONSES, TWO_RESPONSES | {"tool_choice": {"type": "function", "name": "g"}}, [G], [F]),
    (RESPONSES, TWO_RESPONSES | {"tool_choice": {"type": "allowed_tools", "mode": "required",
        "tools": [{"type": "function", "name": "f"}]}}, [F], [G]),
    (RESPONSES, {"tools": [{**TWO_RESPONSES["tools"][1], "strict": True}]},
     [F, "Hi"], [F.replace("city", "town")]),
    (MESSAGES, {"tools": [messages_tool()], "tool_choice": {"type": "any"}}, [F, FF], ["Hi"]),
    (MESSAGES, {"tools": [messages_tool()], "tool_choice": {
        "type": "any", "disable_parallel_tool_use": True}}, [F], [FF]),
    (MESSAGES, {"tools": [messages_tool()], "tool_choice": {"type": "tool", "name": "f"}},
     [F], [FF, "Hi"]),
    (MESSAGES, {"tools": [messages_tool(strict=True)], "tool_choice": {"type": "auto"}},
     ["Hi", F], [F.replace("city", "town")]),
]  # fmt: skip


@pytest.mark.parametrize(("path", "fields", "right", "wrong"), CHOICES)
def test_choices_of_tools_of_each_dialect(
    path: str, fields: dict[str, Any], right: list[str], wrong: list[str], asked: Any
) -> None:
    grammar = asked(path, fields)
    taken = [bytes_only().accepts(grammar.text, text) for text in right + wrong]
    assert taken == [True] * len(right) + [False] * len(wrong)


def test_a_choice_and_strictness_do_not_change_the_prompt(
    engine: ScriptedEngine, asked: Any
) -> None:
    asked(CHAT, TWO_CHAT)
    plain = prompt_of(engine)
    asked(CHAT, TWO_CHAT | {"tool_choice": "required", "response_format": {"type": "json_object"}})
    assert prompt_of(engine) == plain
    asked(CHAT, {"tools": [chat_tool(strict=True), chat_tool("g", strict=False)]})
    assert prompt_of(engine) == plain


JSON_FORMAT = {"response_format": {"type": "json_object"}}
REFUSED: list[tuple[str, dict[str, Any], str, str]] = [
    (CHAT, {"response_format": {}}, "response_format.type", "has no type; 'text', 'json_object'"),
    (CHAT, {"response_format": {"type": "structural_tag"}}, "response_format.type", "'regex'"),
    (CHAT, {"response_format": {"type": "json_schema"}}, "response_format.json_schema", "object"),
    (CHAT, {"response_format": {"type": "json_schema", "json_schema": {"name": "a"}}},
     "response_format.json_schema.schema", "is required"),
    (CHAT, {"response_format": {"type": "json_schema", "json_schema": {**NAMED, "strict": "yes"}}},
     "response_format.json_schema.strict", "must be true or false"),
    (CHAT, {"response_format": {"type": "json_schema", "json_schema": {"schema": 5}}},
     "response_format.json_schema.schema", "must be a JSON schema"),
    (CHAT, {"response_format": {"type": "json_schema", "json_schema": {"schema": {
        "properties": {"age": {"minimum": 5, "maximum": 3}}}}}},
     "response_format.json_schema.schema", "response_format.json_schema.schema/properties/age: "
     "minimum (5) is greater than maximum (3)"),
    (CHAT, {"response_format": {"type": "regex"}}, "response_format.regex", "a text that is not"),
    (CHAT, {"response_format": {"type": "json_schema", "json_schema": {"schema": {
        "uniqueItems": True}}}}, "response_format.json_schema.schema", '"strict": false beside'),
    (CHAT, {"response_format": {"type": "regex", "regex": "("}}, "response_format.regex",
     "unclosed group"),
    (CHAT, {"response_format": {"type": "grammar", "grammar": "x", "syntax": "ebnf"}},
     "response_format.syntax", "'lark' or 'gbnf'"),
    (CHAT, JSON_FORMAT | {"guided_regex": "a"}, "guided_regex",
     "'response_format' and 'guided_regex' both give the answer a format"),
    (CHAT, {"structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs.choice",
     "both"),
    (CHAT, {"structured_outputs": {"structural_tag": "{}"}}, "structured_outputs.structural_tag",
     "may have one of: json, regex"),
    (CHAT, {"structured_outputs": {"json_object": 1}}, "structured_outputs.json_object", "true"),
    (CHAT, {"guided_choice": ["a", ""]}, "guided_choice", "not empty"),
    (CHAT, {"guided_json": "{"}, "guided_json", "is not JSON"),
    (CHAT, {"guided_json": '{"type": "\\ud800"}'}, "guided_json", "a lone surrogate"),
    (CHAT, {"grammar": 'start: %json {"\\ud800": 1}'}, "grammar", "%json: has a lone surrogate"),
    (CHAT, JSON_FORMAT | {"k2": {"ignore_stop_tokens": True}}, "k2.ignore_stop_tokens", "ends"),
    (CHAT, TWO_CHAT | {"tool_choice": "required", "k2": {"ignore_stop_tokens": True}},
     "k2.ignore_stop_tokens", "'tool_choice'"),
    (CHAT, TWO_CHAT | {"tool_choice": {"type": "function", "function": {"name": "h"}}},
     "tool_choice", "there is no tool 'h'; the tools are: f, g"),
    (CHAT, TWO_CHAT | {"tool_choice": {"type": "allowed_tools", "allowed_tools": {"tools": []}}},
     "tool_choice", "1 to 1024 tools"),
    (CHAT, TWO_CHAT | {"tool_choice": {"type": "allowed_tools", "mode": "any", "tools": [F_TOOL]}},
     "tool_choice", "'auto' or 'required'"),
    (CHAT, {"tools": [chat_tool(strict="yes")]}, "tools", "'strict' of tool 0"),
    (CHAT, {"tools": [chat_tool("g"), chat_tool(strict=True, parameters={"not": {}})]},
     "tools[1].function.parameters", "tools[1].function.parameters/not: 'not' cannot be held"),
    (COMPLETIONS, JSON_FORMAT | {"k2": {"ignore_stop_tokens": True}}, "k2.ignore_stop_tokens", ""),
    (RESPONSES, {"text": {"format": {"type": "json_schema", "name": "a"}}},
     "text.format.json_schema", "an object with a 'schema'"),
    (RESPONSES, {"text": {"format": {"type": "json_schema", "schema": {"type": "x"}}}},
     "text.format.schema", "text.format.schema/type: x is not a type"),
    (RESPONSES, {"tools": [{"type": "custom", "name": "p"}], "tool_choice": {
        "type": "custom", "name": "p"}}, "tool_choice", "'custom' is not supported"),
    (RESPONSES, {"tools": [{"type": "web_search"}], "tool_choice": "required"}, "tool_choice",
     "there are no tools"),
    (RESPONSES, {"tools": [{"type": "web_search"}, {"type": "function", "name": "f", "strict": True,
        "parameters": {"if": {}}}]}, "tools[1].parameters", "tools[1].parameters/if: "),
]  # fmt: skip


@pytest.mark.parametrize(("path", "fields", "param", "part"), REFUSED)
def test_what_is_wrong_is_refused_by_name(
    path: str, fields: dict[str, Any], param: str, part: str, url: str, engine: ScriptedEngine
) -> None:
    response = post(url, PROMPTS[path] | fields, path)
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, param), error
    assert part in error["message"], error
    assert not engine.submitted


def test_messages_name_the_place_of_a_schema(url: str) -> None:
    wrong = {"properties": {"a": {"minLength": "x"}}}
    for fields, place in (
        ({"output_config": {"format": {"type": "json_schema", "schema": wrong}}},
         "output_config.format.schema/properties/a/minLength: 'x' is not of type 'integer'"),
        ({"tools": [messages_tool(strict=True) | {"input_schema": wrong}]},
         "tools[0].input_schema/properties/a/minLength"),
        ({"tool_choice": {"type": "any"}}, "tool_choice: a call is required, but there are no"),
        ({"output_config": {"format": {"type": "json_schema", "schema": SCHEMA}},
          "output_format": {"type": "json_schema", "schema": SCHEMA}},
         "'output_format.schema' both give the answer a format"),
    ):  # fmt: skip
        response = post(url, PROMPTS[MESSAGES] | fields, MESSAGES)
        assert response.status_code == 400
        assert place in response.json()["error"]["message"]


def test_responses_repeat_what_was_asked(engine: ScriptedEngine, url: str) -> None:
    form = {"type": "json_schema", **NAMED}
    chosen = {"type": "function", "name": "f"}
    for stream in (False, True):
        engine.answer(F)
        body = {"text": {"format": form}, **TWO_RESPONSES, "tool_choice": chosen, "stream": stream}
        text = post(url, PROMPTS[RESPONSES] | body, RESPONSES).text
        last = json.loads(text.strip().rpartition("data: ")[2])
        answer = last["response"] if stream else last
        assert (answer["text"], answer["tool_choice"]) == ({"format": form}, chosen)
    engine.answer("Hi")
    answer = post(url, PROMPTS[RESPONSES], RESPONSES).json()
    assert answer["text"] == {"format": {"type": "text"}}
    assert answer["tool_choice"] == "none"


# --- helpers of the clients -----------------------------------------------------------------------


class Cat(BaseModel):
    kind: Literal["cat"]
    lives: int


class Dog(BaseModel):
    kind: Literal["dog"]
    friends: list[Cat | Dog]


class Pets(BaseModel):
    pets: list[Cat | Dog]
    note: str | None = None


PETS = '{"pets": [{"kind": "dog", "friends": [{"kind": "cat", "lives": 9}]}], "note": null}'


def obeyed(engine: ScriptedEngine, right: str, wrong: str) -> None:
    grammar = engine.submitted[-1].grammar
    assert grammar is not None
    assert bytes_only().accepts(grammar.text, right)
    assert not bytes_only().accepts(grammar.text, wrong)


def test_openai_parses_models(engine: ScriptedEngine, client: openai.OpenAI) -> None:
    engine.answer(f"<think>Hm.</think>{PETS}")
    chat = client.chat.completions.parse(model="toy", messages=QUESTION, response_format=Pets)
    parsed = chat.choices[0].message.parsed
    assert parsed is not None
    assert parsed.pets[0] == Dog(kind="dog", friends=[Cat(kind="cat", lives=9)])
    obeyed(engine, PETS, PETS.replace("9", '"9"'))

    engine.answer(PETS)
    response = client.responses.parse(model="toy", input="Hello", text_format=Pets)
    assert response.output_parsed == parsed
    obeyed(engine, PETS, PETS.replace("cat", "fox"))

    engine.answer(PETS)
    with client.chat.completions.stream(
        model="toy", messages=QUESTION, response_format=Pets
    ) as stream:
        assert stream.get_final_completion().choices[0].message.parsed == parsed


def test_openai_parses_calls_of_strict_tools(engine: ScriptedEngine, client: openai.OpenAI) -> None:
    call = calls_text(call_text(0, PETS, "Pets"))
    engine.answer(call)
    chat = client.chat.completions.parse(
        model="toy", messages=QUESTION, tools=[openai.pydantic_function_tool(Pets)]
    )
    calls = chat.choices[0].message.tool_calls
    assert calls is not None
    assert calls[0].function.parsed_arguments == Pets.model_validate_json(PETS)
    obeyed(engine, call, call.replace("9", "none"))

    engine.answer(call)
    response = client.responses.parse(
        model="toy",
        input="Hello",
        tools=[
            {
                "type": "function",
                "name": "Pets",
                "strict": True,
                "parameters": Pets.model_json_schema(),
                "description": None,
            }
        ],
        tool_choice={"type": "function", "name": "Pets"},
    )
    assert response.output[0].type == "function_call"
    obeyed(engine, call, "Hi")


def test_anthropic_parses_models(engine: ScriptedEngine, claude: anthropic.Anthropic) -> None:
    engine.answer(PETS)
    asked: Any = {"model": "toy", "max_tokens": 100, "messages": QUESTION}
    message = claude.messages.parse(**asked, output_format=Pets)
    assert message.parsed_output == Pets.model_validate_json(PETS)
    obeyed(engine, PETS, PETS.replace("cat", "fox"))

    engine.answer(PETS)
    with claude.messages.stream(**asked, output_format=Pets) as stream:
        assert stream.get_final_message().parsed_output == message.parsed_output

    engine.answer(F)
    answer = claude.messages.create(
        **asked,
        tools=[{"name": "f", "input_schema": SCHEMA, "strict": True}],
        tool_choice={"type": "tool", "name": "f"},
    )
    assert (answer.stop_reason, answer.content[0].type) == ("tool_use", "tool_use")
    obeyed(engine, F, "Hi")
