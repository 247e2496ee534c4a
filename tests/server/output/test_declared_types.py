"""Values without quotation marks, by declared types, and tags within JSON strings."""

from __future__ import annotations

import json
from typing import Any

import pytest

from k2cli.server.output.known_formats import TOOL_FORMATS
from tests.server.output.parsing import parse, value


def _shaped(**properties: object) -> list[dict[str, Any]]:
    parameters = {"type": "object", "properties": properties}
    return [{"type": "function", "function": {"name": "f", "parameters": parameters}}]


@pytest.mark.parametrize("text", ["null", "12", "True", "[1, 2]", '"quoted"', "{'a': 1}", "1e9"])
def test_a_declared_string_stays_what_was_written(text: str) -> None:
    tools = _shaped(a={"type": "string"}, b={"$ref": "#/$defs/b"})
    tools[0]["function"]["parameters"]["$defs"] = {"b": {"enum": ["12", "x"]}}
    for parser, output in (
        (
            "qwen3_coder",
            "<tool_call><function=f><parameter={}>\n{}\n</parameter></function></tool_call>",
        ),
        (
            "minimax_m2",
            '<minimax:tool_call><invoke name="f"><parameter name="{}">{}</parameter></invoke>'
            "</minimax:tool_call>",
        ),
        ("glm47", "<tool_call>f<arg_key>{}</arg_key><arg_value>{}</arg_value></tool_call>"),
        (
            "muse_spark",
            '<atem:function_calls><atem:invoke name="f"><atem:parameter name="{}">{}'
            "</atem:parameter></atem:invoke></atem:function_calls>",
        ),
        ("minicpm5", '<function name="f"><param name="{}"><![CDATA[{}]]></param></function>'),
    ):
        for key in ("a", "b"):
            found = parse(parser, output.format(key, text), tools=tools)
            assert [value(call) for call in found.calls] == [{key: text}], parser


def test_types_decide_where_a_text_may_be_several() -> None:
    tools = _shaped(
        a={"type": ["string", "null"]},
        b={"anyOf": [{"type": "string"}, {"type": "array"}, {"type": "integer"}]},
    )
    for key, text, wanted in (
        ("a", "null", None),
        ("a", "None", "None"),
        ("a", "12", "12"),
        ("b", "12", 12),
        ("b", "12.0", 12),
        ("b", "12.5", "12.5"),
        ("b", "[1, NaN]", "[1, NaN]"),
        ("b", "[1]", [1]),
        ("b", "[1", "[1"),
    ):
        found = parse(
            "glm47",
            f"<tool_call>f<arg_key>{key}</arg_key><arg_value>{text}</arg_value></tool_call>",
            tools=tools,
        )
        assert [value(call) for call in found.calls] == [{key: wanted}]


def test_tags_within_json_strings_end_nothing() -> None:
    tools = _shaped(a={"type": "object"}, b={"type": "integer"})
    inner = '{"x": "\\"</parameter></function></tool_call>\\\\", "y": ["</arg_value>"]}'
    for parser, output in (
        (
            "qwen3_coder",
            "<tool_call><function=f><parameter=a>{}</parameter><parameter=b>1</parameter>"
            "</function></tool_call>",
        ),
        (
            "glm47",
            "<tool_call>f<arg_key>a</arg_key><arg_value>{}</arg_value><arg_key>b</arg_key>"
            "<arg_value>1</arg_value></tool_call>",
        ),
        ("json_tools", '<tool_call>{{"name": "f", "arguments": {{"a": {}, "b": 1}}}}</tool_call>'),
    ):
        plain = TOOL_FORMATS[parser].tokens
        found = parse(parser, output.format(inner) + "x", tools=tools, plain=plain)
        assert [value(call) for call in found.calls] == [{"a": json.loads(inner), "b": 1}], parser
        assert found.text == "x"


def test_a_recipient_at_the_beginning_of_an_answer() -> None:
    """The prompt of gpt-oss ends within a header."""
    found = parse(
        "harmony", ' to=functions.now<|channel|>commentary json<|message|>{"a": 1}<|call|>'
    )
    assert [(call.name, value(call)) for call in found.calls] == [("now", {"a": 1})]
    assert found.text == ""
    for text in ("to be", " to=functions.now or not", "t" * 2000):
        assert parse("harmony", text).text == text
