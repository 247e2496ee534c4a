"""Every keyword of JSON Schema: held, refused by name, or without effect on what is valid."""

from __future__ import annotations

import json
from typing import Any

import pytest
from jsonschema import Draft202012Validator
from jsonschema_specifications import REGISTRY

from k2cli.server.errors import ApiError
from k2cli.server.structured.json_schema import checked_schema
from k2cli.server.structured.keywords import ANNOTATIONS, FORMATS, KNOWN, REFUSED
from tests.server.structured.matching import bytes_only, holds, schema_grammar

DEFS = {"$defs": {"x": {"type": "integer"}}}
TAG = {"type": "object", "required": ["k"]}
# Keyword, schema, a value that is valid, one that is not.
HELD: list[tuple[str, Any, Any, Any]] = [
    ("type", {"type": ["string", "null"]}, None, 1),
    ("const", {"const": {"a": [1, 2]}}, {"a": [1, 2]}, {"a": [1]}),
    ("const", {"const": -0.25}, -0.25, 0.25),
    ("enum", {"enum": [1, "größer", None, 2.5]}, "größer", "gr"),
    ("enum", {"enum": ["a", "b"], "pattern": "^a$"}, "a", "b"),
    ("multipleOf", {"type": "integer", "multipleOf": 3}, -9, 4),
    ("multipleOf", {"type": "number", "multipleOf": 0.01}, 1.25, 1.255),
    ("minimum", {"type": "number", "minimum": 3}, 3, 2.5),
    ("minimum", {"minimum": 3}, "a", 2),
    ("maximum", {"type": "integer", "maximum": -3}, -3, -2),
    ("exclusiveMinimum", {"type": "integer", "exclusiveMinimum": 3}, 4, 3),
    ("exclusiveMaximum", {"type": "number", "exclusiveMaximum": 3}, 2.9, 3),
    ("minLength", {"minLength": 2}, "äö", "ä"),
    ("maxLength", {"type": "string", "maxLength": 2}, "😀😀", "😀😀😀"),
    ("pattern", {"type": "string", "pattern": "b"}, "abc", "ac"),
    ("pattern", {"type": "string", "pattern": r'^[\d"]+$', "maxLength": 3}, '1"3', '1"34'),
    ("format", {"type": "string", "format": "date"}, "2026-11-29", "2026-13-01"),
    ("items", {"items": {"type": "integer"}}, [1, 2], [1, "a"]),
    ("prefixItems", {"type": "array", "prefixItems": [{"type": "integer"}], "items": False},
     [1], [1, 2]),
    ("minItems", {"type": "array", "minItems": 2}, [1, 2], [1]),
    ("maxItems", {"type": "array", "maxItems": 1}, [1], [1, 2]),
    ("properties", {"properties": {"a": {"type": "integer"}}}, {"a": 1, "b": "x"}, {"a": "x"}),
    ("patternProperties", {"type": "object", "patternProperties": {"^x": {"type": "integer"}}},
     {"xa": 1, "b": "s"}, {"xa": "s"}),
    ("patternProperties", {"type": "object", "properties": {"xa": {"type": "string"}},
     "patternProperties": {"^x": {"minLength": 3}}}, {"xa": "abc"}, {"xa": "a"}),
    ("additionalProperties", {"type": "object", "additionalProperties": {"type": "integer"}},
     {"q": 1}, {"q": "x"}),
    ("additionalProperties", {"type": "object", "properties": {"a": {}},
     "additionalProperties": False}, {"a": 1}, {"b": 1}),
    ("required", {"required": ["a"]}, {"a": 1}, {}),
    ("required", {"required": ["a"]}, "no object", {"b": 1}),
    ("minProperties", {"type": "object", "minProperties": 1}, {"a": 1}, {}),
    ("maxProperties", {"type": "object", "maxProperties": 1}, {"a": 1}, {"a": 1, "b": 1}),
    ("allOf", {"allOf": [{"type": "integer", "minimum": 2}, {"maximum": 4}]}, 3, 5),
    ("anyOf", {"anyOf": [{"type": "integer"}, {"type": "string", "maxLength": 1}]}, "a", "ab"),
    ("anyOf", {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"],
     "anyOf": [{"required": ["y"]}, {"required": ["z"]}]}, {"x": 1, "z": 2}, {"x": 1}),
    ("oneOf", {"oneOf": [{"type": "string"}, {"type": "integer"}]}, 1, 1.5),
    ("oneOf", {"oneOf": [{**TAG, "properties": {"k": {"const": "a"}}},
     {**TAG, "properties": {"k": {"const": "b"}, "n": {"type": "null"}}}]},
     {"k": "a", "n": 1}, {"k": "b", "n": 1}),
    ("$ref", {**DEFS, "$ref": "#/$defs/x"}, 1, "a"),
    ("$ref", {**DEFS, "$ref": "#/$defs/x", "minimum": 5}, 5, 3),
    ("$ref", {"type": "object", "properties": {"a": {"$ref": "#"}}, "additionalProperties": False},
     {"a": {"a": {}}}, {"a": {"b": 1}}),
    ("$ref", {"$defs": {"a/b ~": {"type": "null"}}, "$ref": "#/$defs/a~1b%20~0"}, None, 1),
    ("$ref", {"$defs": {"x": {"$anchor": "here", "type": "null"}}, "$ref": "#here"}, None, 1),
    ("$ref", {"$id": "http://a/b", **DEFS, "$ref": "http://a/b#/$defs/x"}, 1, "a"),
    # Kept where other words say the same.
    ("unevaluatedProperties", {"type": "object", "properties": {"a": {}},
     "unevaluatedProperties": False}, {"a": 1}, {"b": 1}),
    ("unevaluatedItems", {"type": "array", "prefixItems": [{}], "unevaluatedItems": False},
     [1], [1, 2]),
    ("propertyNames", {"type": "object", "propertyNames": {"pattern": "^x"},
     "additionalProperties": {"type": "integer"}}, {"xa": 1}, {"a": 1}),
    ("propertyNames", {"type": "object", "propertyNames": {"type": "string", "enum": ["a"]},
     "additionalProperties": {"type": "integer"}}, {"a": 1}, {"b": 1}),
]  # fmt: skip
# Of older drafts, which the newest metaschema does not have.
OLDER: list[tuple[Any, Any, Any]] = [
    ({"items": [{"type": "integer"}], "additionalItems": False}, [1], [1, 2]),
    ({"items": [{"type": "integer"}], "additionalItems": {"type": "null"}}, [1, None], [1, 2]),
    ({"items": {"type": "integer"}, "additionalItems": False}, [1, 2], ["a"]),
    ({"type": "integer", "minimum": 3, "exclusiveMinimum": True}, 4, 3),
    ({"type": "integer", "maximum": 3, "exclusiveMaximum": False}, 3, 4),
    ({"definitions": {"x": {"type": "null"}}, "$ref": "#/definitions/x"}, None, 1),
]
NOT_HELD: dict[str, Any] = {
    "$dynamicAnchor": "n",
    "$dynamicRef": "#n",
    "$recursiveAnchor": True,
    "$recursiveRef": "#",
    "contains": {"type": "integer"},
    "dependencies": {"a": ["b"]},
    "dependentRequired": {"a": ["b"]},
    "dependentSchemas": {"a": {"required": ["b"]}},
    "disallow": "integer",
    "divisibleBy": 3,
    "extends": {"type": "integer"},
    "if": {"type": "integer"},
    "not": {"type": "string"},
    "nullable": True,
    "propertyNames": {"maxLength": 3},
    "uniqueItems": True,
}
NO_EFFECT: list[Any] = [
    {"uniqueItems": False}, {"nullable": False}, {"minItems": 0}, {"then": {"type": "integer"}},
    {"else": {"type": "integer"}}, {"minContains": 2}, {"maxContains": 1}, {"required": []},
    {"propertyNames": {"type": "string"}}, {"not": False}, {"dependentRequired": {}},
    {"unevaluatedItems": True}, {"additionalItems": False}, {"maxLength": 10**30},
    {"minLength": 0.0}, {"type": ["integer", "null"], "format": "int32"}, {"x-order": 1},
]  # fmt: skip


@pytest.mark.parametrize(("keyword", "schema", "valid", "wrong"), HELD)
def test_what_is_held_is_held(keyword: str, schema: Any, valid: Any, wrong: Any) -> None:
    judge = Draft202012Validator(schema, format_checker=Draft202012Validator.FORMAT_CHECKER)
    assert (judge.is_valid(valid), judge.is_valid(wrong)) == (True, False)
    assert (holds(schema, valid), holds(schema, wrong)) == (True, False)


@pytest.mark.parametrize(("schema", "valid", "wrong"), OLDER)
def test_older_drafts_mean_the_same(schema: Any, valid: Any, wrong: Any) -> None:
    assert (holds(schema, valid), holds(schema, wrong)) == (True, False)


@pytest.mark.parametrize("keyword", NOT_HELD)
def test_what_cannot_be_held_is_refused_at_its_place(keyword: str) -> None:
    inner = {keyword: NOT_HELD[keyword]}
    schema = {"type": "object", "properties": {"a/b": {"items": inner}}}
    with pytest.raises(ApiError) as caught:
        checked_schema(schema, "field")
    assert caught.value.message.startswith(f"field/properties/a~1b/items/{keyword}: ")
    assert (caught.value.status, caught.value.param) == (400, "field")
    assert holds(schema, {"a/b": [1, "a"]}, lenient=True)


@pytest.mark.parametrize("extra", NO_EFFECT)
def test_a_value_that_says_nothing_is_left_out(extra: dict[str, Any]) -> None:
    schema = {"type": ["integer", "null", "array", "string"], **extra}
    assert holds(schema, 1)
    assert holds(schema, None)


def test_no_keyword_is_forgotten() -> None:
    """Of all drafts: what the metaschemas have is in one of the lists, and in the tests above."""
    words: set[str] = set()
    for uri in REGISTRY:
        meta = REGISTRY.contents(uri)
        if isinstance(meta, dict) and "draft-03" not in uri:
            words |= set(meta.get("properties", {}))
    assert len(words) > 50
    assert words <= KNOWN, sorted(words - KNOWN)
    held = KNOWN - ANNOTATIONS - REFUSED.keys()
    assert held - {keyword for keyword, *_ in HELD} == {"additionalItems"}
    effectless = {"then", "else", "minContains", "maxContains"}
    rewritten = {"unevaluatedItems", "unevaluatedProperties"}
    assert REFUSED.keys() - NOT_HELD.keys() == effectless | rewritten


def test_annotations_say_nothing() -> None:
    schema = {"type": "integer", **dict.fromkeys(ANNOTATIONS - {"$schema"}, "a")}
    for scheme in ("http", "https"):  # many write one for the other
        draft = f"{scheme}://json-schema.org/draft-07/schema#"
        assert checked_schema({**schema, "$schema": draft}, "s") == {"type": "integer"}


def test_unknown_words_are_refused_and_slips_named() -> None:
    for word, meant in (("minlength", "minLength"), ("foo", "")):
        with pytest.raises(ApiError) as caught:
            checked_schema({"anyOf": [{"type": "string"}, {word: 3}]}, "s")
        assert caught.value.message.startswith(f"s/anyOf/1/{word}: '{word}' is not a keyword")
        assert f"'{meant}'?" in caught.value.message or not meant


def test_formats_are_those_of_the_list() -> None:
    for name in FORMATS:
        checked_schema({"type": "string", "format": name}, "s")
    with pytest.raises(ApiError, match="s/format: regex cannot be held; the formats are date, "):
        checked_schema({"format": "regex"}, "s")
    assert holds({"type": "string", "format": "regex"}, "(", lenient=True)


def test_a_declared_name_has_one_spelling_and_comes_once() -> None:
    grammar = schema_grammar({"type": "object", "properties": {"a": {"type": "integer"}}})
    matches = bytes_only().accepts
    assert matches(grammar, '{"a":1,"b":"x"}')
    assert not matches(grammar, '{"\\u0061":"x"}')
    assert not matches(grammar, '{"a":1,"a":"x"}')
    assert not matches(grammar, json.dumps({"a": 1}, indent=80))
