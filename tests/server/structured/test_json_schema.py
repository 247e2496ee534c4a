"""What is wrong with a schema is named with its place; nothing that a client sends takes long."""

from __future__ import annotations

import math
from typing import Any

import pytest

from k2cli.server.errors import ApiError
from k2cli.server.structured import json_schema
from k2cli.server.structured.json_schema import checked_schema
from tests.server.structured.matching import holds


def inside(schema: Any, **more: Any) -> dict[str, Any]:
    return {"type": "object", "properties": {"a": schema}, **more}


def chain(length: int, link: Any) -> dict[str, Any]:
    """Definitions that refer to the next one each."""
    names = {f"d{i}": link(f"#/$defs/d{i + 1}") for i in range(length)}
    return {"$ref": "#/$defs/d0", "$defs": {**names, f"d{length}": {"type": "object"}}}


def nested(levels: int) -> Any:
    schema: Any = {"type": "object"}
    for _ in range(levels):
        schema = inside(schema)
    return schema


def tagged(count: int, tag: str = "v{}") -> dict[str, Any]:
    options = [
        {"type": "object", "properties": {"k": {"const": tag.format(i)}}, "required": ["k"]}
        for i in range(count)
    ]
    return {"oneOf": options}


X = "#/$defs/x"
PLACES: list[tuple[Any, str]] = [
    (5, "s: 5 is not a schema"),
    (False, "s: allows no value"),
    ({"$schema": "http://a/b"}, "s/$schema: http://a/b is not known"),
    (inside({"minimum": 5, "maximum": 3}), "s/properties/a: minimum (5) is greater than maximum"),
    (inside({"minimum": 3, "exclusiveMaximum": 3}), "s/properties/a: minimum (3) is not less"),
    (inside({"minLength": 5, "maxLength": 3}), "s/properties/a: minLength (5) is greater than"),
    (inside({"minItems": 5, "maxItems": 3}), "s/properties/a: minItems (5) is greater than"),
    (inside({"type": "objekt"}), "s/properties/a/type: objekt is not a type"),
    (inside({"enum": []}), "s/properties/a/enum: has no values"),
    (inside({"anyOf": []}), "s/properties/a/anyOf: must be an array of schemas"),
    (inside({"properties": []}), "s/properties/a/properties: must be an object of schemas"),
    (inside({"required": "x"}), "s/properties/a/required: 'x' is not of type 'array'"),
    (inside({"minLength": -1}), "s/properties/a/minLength: -1 is less than the minimum of 0"),
    (inside({"minItems": False}), "s/properties/a/minItems: False is not of type 'integer'"),
    (inside({"multipleOf": 0}), "s/properties/a/multipleOf: 0 is less than or equal to"),
    (inside({"format": []}), "s/properties/a/format: [] cannot be held"),
    (inside({"minimum": 2**60}), "s/properties/a/minimum: 1152921504606846976 is too large"),
    (inside({"minLength": 2**40}), "s/properties/a/minLength: 1099511627776 is too large"),
    (inside({"enum": [1, 10**30]}), "s/properties/a/enum/1: 1000"),
    (inside({"const": 1e-20}), "s/properties/a/const: 1e-20 is too large or too small"),
    (inside({"enum": [1, math.nan]}), "s/properties/a/enum/1: NaN is too large or too small"),
    (inside({"minimum": math.nan}), "s/properties/a/minimum: NaN is too large"),
    (inside({"title": "\ud800"}), "s: has a lone surrogate"),
    (inside({"minProperties": 2}), "s/properties/a/minProperties: 2: more than 1 cannot be held"),
    (inside({"$ref": "http://a/b"}), "s/properties/a/$ref: http://a/b is another document"),
    (inside({"$ref": "other.json#/x"}), "s/properties/a/$ref: other.json#/x is another document"),
    (inside({"$ref": "#/$defs/none"}), "s/properties/a/$ref: #/$defs/none points to nothing"),
    (inside({"$ref": "#none"}), "s/properties/a/$ref: #none points to nothing"),
    ({"prefixItems": [{"$ref": f"#/prefixItems/{'9' * 5000}"}]}, "s/prefixItems/0/$ref: #/prefixI"),
    (inside({"$id": "b", "$ref": "#"}), "s/properties/a/$id: a schema with a name of its own"),
    (inside({"const": {"b": ["a\x00"]}}), "s/properties/a/const/b/0: has a control character"),
    (inside({"required": ["\x7f"]}), "s/properties/a: the name '\\x7f' has a control character"),
    (inside({"properties": {"\x01": {}}}), "s/properties/a: the name '\\x01' has a control"),
    *((inside({"pattern": pattern}), f"s/properties/a/pattern: {pattern} has a control")
      for pattern in (r"^a\x00$", r"\u001F", "a\x01b", r"[a]\x{7f}", r"[\x00]", r"\v")),
    # Found by compiling the parts.
    (inside({"type": "string", "pattern": "(?=a)b"}), "s/properties/a: the pattern (?=a)b cannot"),
    (inside({"anyOf": [{"type": "null"}, {"pattern": "[a"}]}),
     "s/properties/a/anyOf/1/pattern: [a has a class without an end"),
    (inside({"items": {"$ref": X}}, **{"$defs": {"x": {"pattern": r"(a)\1"}}}),
     r"s/$defs/x: the pattern (a)\1 cannot be held: backreferences"),
    (inside({"allOf": [{"type": "string"}, {"type": "null"}]}, required=["a"]),
     "s/properties/a: incompatible types"),
    (inside({"items": False, "type": "array", "minItems": 1}, required=["a"]),
     "s/properties/a/items: no value is allowed"),
    (inside({"type": "object", "required": ["c"], "additionalProperties": False}, required=["a"]),
     "s/properties/a/required: c is required, and 'properties' does not have it"),
    (inside({"type": "string", "const": "ab", "pattern": "^x"}, required=["a"]),
     "s/properties/a: no text has all that it asks for"),
    (inside({"patternProperties": {"^x": {}, "y$": {}}}),
     "s/properties/a: patternProperty regexes /^x/ and /y$/ are not disjoint"),
    (inside({"type": "number", "multipleOf": 0.07}), "s/properties/a: Value for 'multipleOf' has"),
    # Exactly one of several that overlap.
    (inside({"oneOf": [{"maxLength": 3}, {"type": "string"}]}), "s/properties/a/oneOf: two of"),
    (inside({"oneOf": [{"const": 1}, {"type": "integer"}]}), "s/properties/a/oneOf: two of"),
    (tagged(300, "same"), "s/oneOf: two of its schemas may match the same value"),
    # Values without an end.
    ({"$ref": "#"}, "s: no value that ends matches"),
    (inside({"$ref": "#"}, required=["a"]), "s: no value that ends matches"),
    # Bounds.
    (nested(60), "s: nests more than 100 arrays and objects"),
    (inside({"enum": list(range(10_001))}), "s/properties/a/enum: has 10001 values"),
    (inside({"enum": ["x" * 50_001]}), "s/properties/a/enum/0: has more than 50000 letters"),
    (inside({"enum": [{"b": [i, i]} for i in range(4_000)]}), "s/properties/a/enum: has more"),
    ({"properties": {f"p{i}": {} for i in range(2_001)}}, "s/properties: has 2001 members"),
    ({"patternProperties": {f"^x{i}_": {} for i in range(65)}}, "s/patternProperties: has 65"),
    ({"required": [f"p{i}" for i in range(2_001)]}, "s/required: has more than 2000 names"),
    ({"prefixItems": [{}] * 5_000}, "s: has more than 5000 subschemas"),
    (inside({}, description="x" * 600_000), "s: has 600"),
    ({"allOf": [{"multipleOf": 70_001}, {"multipleOf": 100_000}]}, "s/allOf/0/multipleOf: 70001"),
    (chain(2_000, lambda ref: {"$ref": ref}), "s: its references nest more than 400 schemas"),
    (chain(30, lambda ref: {"type": "object", "maxProperties": 9, "properties": {
        "l": {"$ref": ref, "maxProperties": 5}, "r": {"$ref": ref, "maxProperties": 5}}}),
     "s: references with other keywords beside them make too many copies"),
    (inside({"$ref": X, "maxProperties": 5}, **{"$defs": {"x": inside(
        {"$ref": X, "maxProperties": 5})}}), "s: a reference with other keywords beside it leads"),
    ({"allOf": [{"anyOf": [inside({"const": i}), inside({"const": -i})]} for i in range(20)]},
     "s: "),
]  # fmt: skip


@pytest.mark.parametrize(("schema", "message"), PLACES)
def test_what_is_wrong_is_named_with_its_place(schema: Any, message: str) -> None:
    for _ in range(2):  # the second time from the cache
        with pytest.raises(ApiError) as caught:
            checked_schema(schema, "s")
        assert caught.value.message.startswith(message), caught.value.message
        assert (caught.value.status, caught.value.param) == (400, "s")


@pytest.mark.parametrize(
    "pattern", [r"^[^\x00-\x1f]*$", r"^a\x0Ab\u0009?$", r"^[\]\x00a]\t?$", "é"]
)
def test_patterns_with_other_escapes_are_taken(pattern: str) -> None:
    checked_schema({"type": "string", "pattern": pattern}, "s")


def test_large_schemas_that_are_allowed_are_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    large = [
        {"type": "object", "properties": {f"p{i}": {"type": "integer"} for i in range(800)}},
        chain(150, lambda ref: inside({"$ref": ref})),
        tagged(500),
        {"type": "string", "pattern": "^((((a{1,100}){1,100}){1,100}){1,100}){1,100}$"},
        {"type": "array", "maxItems": 10**8, "items": {"type": "string", "maxLength": 10**6}},
    ]
    read = [checked_schema(schema, "s") for schema in large]

    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("was read again")

    monkeypatch.setattr(json_schema, "_checked_now", fail)
    assert [checked_schema(schema, "another place") for schema in large] == read


def test_a_union_by_a_tag_is_held_whatever_refers_to_it() -> None:
    """Pydantic's discriminated unions: ``oneOf`` of references, within each other."""
    either = {"oneOf": [{"$ref": "#/$defs/cat"}, {"$ref": "#/$defs/dog"}], "discriminator": {}}
    kind = {"type": "object", "required": ["kind"], "additionalProperties": False}
    cat = {**kind, "properties": {"kind": {"const": "cat"}}}
    dog = {**kind, "properties": {"kind": {"enum": ["dog", "wolf"]}, "chases": either}}
    schema = {**either, "$defs": {"cat": cat, "dog": dog}}
    assert holds(schema, {"kind": "dog", "chases": {"kind": "wolf", "chases": {"kind": "cat"}}})
    assert not holds(schema, {"kind": "cat", "chases": {"kind": "cat"}})
    numbers = {"oneOf": [{"type": "integer", "maximum": 3}, {"type": "integer", "minimum": 5}]}
    assert holds(numbers, 5)
    assert not holds(numbers, 4)
    closed = {"type": "object", "additionalProperties": False}
    one = {**closed, "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    other = {**closed, "properties": {"b": {"type": "integer"}}, "required": ["b"]}
    assert holds({"oneOf": [one, other]}, {"b": 1})


def test_what_is_lenient_leaves_out_what_cannot_be_held() -> None:
    schema = inside({"type": "integer", "not": {"const": 3}, "colour": "red"}, required=["a"])
    assert holds(schema, {"a": 3}, lenient=True)
    assert not holds(schema, {"a": "x"}, lenient=True)
    assert holds(tagged(2, "same"), {"k": "same"}, lenient=True)
    unknown = {"type": "string", "pattern": "(?=a)"}
    schema = {"type": "object", "properties": {"a": unknown, "b": {"type": "null"}, "c": unknown}}
    assert holds(schema, {"a": "x", "b": None, "c": "y"}, lenient=True)
    assert not holds(schema, {"b": 1}, lenient=True)
    with pytest.raises(ApiError, match="s/type: objekt is not a type"):
        checked_schema({"type": "objekt"}, "s", lenient=True)
