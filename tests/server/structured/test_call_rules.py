"""Rules of the grammars of calls: what they reject, what they allow besides, what is refused."""

from __future__ import annotations

import json

import pytest

from k2cli.server.errors import ApiError
from k2cli.server.structured.calls import Function
from k2cli.server.structured.keywords import FORMATS
from tests.server.structured.sampling import FORMS, grammar, model, read
from tests.server.structured.written import written

_REQUIRED = Function(
    "find",
    {
        "type": "object",
        "properties": {"word": {"enum": ["a", "b"]}, "count": {"type": "integer", "maximum": 9}},
        "required": ["word", "count"],
        "additionalProperties": False,
    },
    strict=True,
)
_WRONG = [
    ("found", {"word": "a", "count": 1}),
    ("find", {"word": "a"}),
    ("find", {"word": "c", "count": 1}),
    ("find", {"word": "a", "count": 10}),
    ("find", {"word": "a", "count": "x"}),
    ("find", {"word": "a", "count": True}),
    ("find", {"word": "a", "count": 1, "more": 1}),
    ("find", {}),
]


@pytest.mark.parametrize("parser", FORMS)
def test_wrong_calls_are_rejected(parser: str) -> None:
    of = model(parser)
    matcher = of.matcher(grammar(of, [_REQUIRED], False, False))

    def accepts(name: str, arguments: dict[str, object]) -> bool:
        copy, ids = matcher.deep_copy(), of.ids(written(parser, name, arguments))
        return bool(copy.try_consume_tokens(ids) == len(ids) and copy.is_accepting())

    assert accepts("find", {"word": "a", "count": 9})
    for name, arguments in _WRONG:
        assert not accepts(name, arguments), (name, arguments)


_WEATHER = Function(
    "weather",
    {
        "type": "object",
        "properties": {
            "city": {"type": "string"},
            "metric": {"type": "boolean"},
            "places": {"type": "array", "items": {"type": "object"}},
        },
        "required": ["city"],
    },
    strict=True,
)
_WAYS = [
    ("pythonic", "<|tool_call_start|>[weather(city='It\\'s', metric=True)]<|tool_call_end|>"),
    ("llama4_pythonic", '<|python_start|>[weather(city="It\'s", metric=true)]<|python_end|>'),
    (
        "qwen3_coder",
        "<function=weather>\n<parameter=city>\nIt's\n</parameter>\n<parameter=metric>\nTrue\n"
        "</parameter>\n</function>",
    ),
    (
        "qwen3_coder",
        "<tool_call>\n<function=weather>\n<parameter=city>\nIt's\n</parameter>\n"
        '<parameter=places>\n[{"a": "</parameter>"}]\n</parameter>\n</function>\n</tool_call>',
    ),
    (
        "minicpm5",
        '<function name="weather"><param name="city"><![CDATA[It\'s]]></param></function>',
    ),
    (
        "glm47",
        "<tool_call>weather<arg_key>city</arg_key><arg_value>It's\n</arg_value></tool_call>",
    ),
    ("mistral", '[TOOL_CALLS]weather[CALL_ID]abcDEF123[ARGS]{"city": "It\'s"}'),
    ("mistral", '[TOOL_CALLS][{"name": "weather", "arguments": {"city": "It\'s"}}]'),
    (
        "deepseek_v3",
        "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>weather\n```json\n"
        '{"city": "It\'s"}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>',
    ),
    ("harmony", ' to=functions.weather<|channel|>commentary json<|message|>{"city": "It\'s"}'),
    (
        "gemma4",
        '<|tool_call>call:weather{city:<|"|>It\'s<|"|>,places:[{a:[1,{b:<|"|>}{<|"|>}]}]}<tool_call|>',
    ),
    (
        "kimi_k3",
        'Let me see.<|close|>response<|sep|><|open|>tools<|sep|><|open|>call tool="weather" '
        'index="3"<|sep|><|open|>json type="object"<|sep|>{"city": "It\'s"}<|close|>json<|sep|>'
        "<|close|>call<|sep|><|close|>tools<|sep|>",
    ),
]


@pytest.mark.parametrize(("parser", "output"), _WAYS)
def test_other_ways_of_writing(parser: str, output: str) -> None:
    of = model(parser)
    matcher = of.matcher(grammar(of, [_WEATHER], True, True))
    ids = of.ids(output)
    count = matcher.try_consume_tokens(ids)
    assert count == len(ids), output[count:]
    assert matcher.is_accepting()
    (call,) = read(of, ids, [_WEATHER], [10, 20]).calls
    assert (call.name, json.loads(call.arguments)["city"]) == ("weather", "It's")


def _one(schema: object, **more: object) -> Function:
    parameters = {"type": "object", "properties": {"a": schema}, "required": ["a"], **more}
    return Function("f", parameters, strict=True, field="tools[0].function")


_REFUSED = [
    ("qwen3_coder", _one({"type": ["string", "integer"], "minimum": 3}), "not told apart"),
    ("qwen3_coder", _one({"type": "string", "pattern": "a^b"}), "its parameters: lookarounds"),
    ("glm47", _one({"type": "string", "maxLength": 50_000}), "length of more than 10000"),
    ("minimax_m2", _one({"type": "string", "enum": [" a "]}), "can be written between these tags"),
    ("muse_spark", _one({"not": {"type": "string"}}), "parameters"),
    ("deepseek_v4", _one({}, minProperties=2), "minProperties|written one by one"),
    ("longcat", Function("f(x)", None), "name cannot be written"),
    ("qwen3_coder", Function("a>b", None), "name cannot be written"),
    ("kimi_k2", Function("a{b", None), "letter '{'"),
    ("harmony", Function("a b", None), "letter ' '"),
    ("pythonic", Function("get-weather", None), "no name in Python"),
    ("pythonic", Function("f", {"properties": {"from": {}}, "required": ["from"]}), "'from': its"),
    ("function_gemma", _one({"type": "array"}), "no objects and arrays"),
    ("gemma4", _one({"type": "array", "items": {"type": "integer"}, "contains": {}}), "contains"),
    ("json_tools", _one({"type": "string", "pattern": "(?=a)"}), "parameters"),
    ("json_tools", Function("", None), "name has no"),
    ("json_tools", Function("x" * 300, None), "over 256 letters"),
]


@pytest.mark.parametrize(("parser", "function", "why"), _REFUSED)
def test_what_cannot_be_held_is_refused(parser: str, function: Function, why: str) -> None:
    with pytest.raises(ApiError, match=why) as error:
        grammar(model(parser), [function], True, False)
    assert error.value.param == function.field
    assert error.value.status == 400
    assert parser in error.value.message


@pytest.mark.parametrize("parser", FORMS)
def test_functions_that_are_not_strict_are_held_to_what_is_possible(parser: str) -> None:
    schema = {
        "properties": {
            "ok": {"enum": [1, 2]},
            "bad": {"type": "string", "pattern": "(?=a)b", "format": "unknown"},
            "other": {"type": "integer", "unknown": 1, "not": {"const": 3}},
        },
        "required": ["ok"],
        "if": {},
    }
    function = Function("f", schema)
    of = model(parser)
    matcher = of.matcher(grammar(of, [function], False, False))
    for arguments, allowed in (({"ok": 2, "bad": "x"}, True), ({"ok": "x"}, False)):
        ids = of.ids(written(parser, "f", arguments))
        copy = matcher.deep_copy()
        accepted = copy.try_consume_tokens(ids) == len(ids) and copy.is_accepting()
        # llguidance refuses the whole schema for its pattern, and then any object is allowed.
        whole = parser in ("kimi_k2", "deepseek_v3", "json_tools", "llama3_json", "mistral")
        assert accepted == (allowed or whole or parser == "harmony"), arguments


def test_free_text_has_no_spelled_marker() -> None:
    of = model("json_tools", plain=True)
    matcher = of.matcher(grammar(of, [_REQUIRED], True, True))
    text = of.letter_ids("The marker is <tool_call")
    assert matcher.try_consume_tokens(text) == len(text)
    assert matcher.is_accepting()
    assert matcher.consume_token(of.letter_ids(">")[0])
    assert not matcher.is_accepting()
    assert matcher.validate_tokens(of.letter_ids(" which")) < len(" which")
    bare = model("llama3_json")
    matcher = bare.matcher(grammar(bare, [_REQUIRED], True, True))
    assert matcher.validate_tokens(bare.letter_ids('{"a": 1}')) == 2
    assert matcher.validate_tokens(bare.letter_ids("It is {1}")) == 9


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_texts_without_quotes_are_held_to_the_same_formats(name: str) -> None:
    of = model("minimax_m2")
    matcher = of.matcher(grammar(of, [_one({"type": "string", "format": name})], False, False))
    for text, allowed in ((_OF_FORMATS[name], True), ("no such thing", False)):
        copy, ids = matcher.deep_copy(), of.ids(written("minimax_m2", "f", {"a": text}))
        accepted = copy.try_consume_tokens(ids) == len(ids) and copy.is_accepting()
        assert accepted == allowed, text


_OF_FORMATS = {
    "date": "2026-11-29",
    "date-time": "2026-11-29T18:00:01.5+01:00",
    "duration": "P3DT4H",
    "email": "ada.l@example.org",
    "hostname": "a-b.example.org",
    "ipv4": "127.0.0.255",
    "ipv6": "fe80::1:a",
    "time": "18:00:00Z",
    "uri": "https://example.org/a?b=%20c",
    "uuid": "123e4567-e89b-12d3-a456-426614174000",
}
