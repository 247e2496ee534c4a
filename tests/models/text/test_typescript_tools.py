"""Declarations of tools in TypeScript, in the form that Kimi K2.5 was trained on."""

from __future__ import annotations

from typing import Any

import pytest

from k2cli.models.text.typescript_tools import sorted_deeply, typescript_declarations


def _tool(parameters: Any, name: str = "f", **members: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": parameters, **members}}


def _declared(*tools: dict[str, Any]) -> str | None:
    return typescript_declarations(sorted_deeply(list(tools)))


def _inside(*tools: dict[str, Any]) -> str:
    text = _declared(*tools)
    assert text is not None
    begin, end = "# Tools\n\n## functions\nnamespace functions {\n", "\n}\n"
    assert text.startswith(begin)
    assert text.endswith(end)
    return text[len(begin) : -len(end)]


def _type_of(schema: Any) -> str:
    text = _inside(_tool({"properties": {"x": schema}, "required": ["x"]}))
    return text.removeprefix("type f = (_: {\n  x: ").removesuffix("\n}) => any;")


def test_a_function_with_required_and_optional_fields() -> None:
    parameters = {
        "type": "object",
        "required": ["city", "area"],
        "properties": {
            "unit": {"type": "string", "enum": ["c", "f"], "default": "c"},
            "city": {"type": "string", "description": "Name, as on a map.\n\nNot a code."},
            "days": {"type": "integer", "minimum": 1, "maximum": 14, "default": 3},
            "area": {
                "type": "object",
                "properties": {"radius": {"type": "number"}, "all": {"type": "boolean"}},
                "required": ["radius"],
                "additionalProperties": False,
            },
        },
    }
    assert (
        _inside(_tool(parameters, "get_weather", description="Get the weather.\nToday's."))
        == """\
// Get the weather.
// Today's.
type get_weather = (_: {
  area: {
    radius: number,
    all?: boolean,
    [k: string]: never
  },
  // Name, as on a map.

  // Not a code.
  city: string,
  // maximum: 14, minimum: 1
  // Default: 3
  days?: number,
  // Default: "c"
  unit?: "c" | "f"
}) => any;"""
    )


@pytest.mark.parametrize(
    ("schema", "text"),
    [
        ({}, "any"),
        (True, "any"),
        (False, "null"),
        ({"type": "file"}, "file"),
        ({"type": ["string", "null"]}, "string | null"),
        ({"type": ["integer", "array", "object"]}, "number | Array<any> | {}"),
        ({"anyOf": [{"type": "string"}, {"enum": [1, None, True]}]}, "string | 1 | None | True"),
        ({"type": ["string", "null"], "enum": ["a", None]}, '"a" | None'),
        ({"type": "array"}, "Array<any>"),
        ({"type": "array", "items": {"type": "array", "items": {}}}, "Array<Array<any>>"),
        (
            {"type": "array", "items": {"type": "string", "description": "A path"}},
            "Array<\n    // A path\n    string\n  >",
        ),
        ({"type": "object"}, "{}"),
        ({"type": "object", "additionalProperties": True}, "{\n    [k: string]: any\n  }"),
        (
            {"type": "object", "additionalProperties": {"type": "integer"}},
            "{\n    [k: string]: number\n  }",
        ),
    ],
)
def test_types(schema: Any, text: str) -> None:
    assert _type_of(schema) == text


def test_definitions_become_interfaces() -> None:
    parameters = {
        "$defs": {"Step": {"type": "object", "description": "One", "properties": {"do": {}}}},
        "properties": {"steps": {"type": "array", "items": {"$ref": "#/$defs/Step"}}},
    }
    assert _inside(_tool(parameters)).splitlines() == [
        "// One",
        "interface Step {",
        "  do?: any",
        "}",
        "type f = (_: {",
        "  steps?: Array<Step>",
        "}) => any;",
    ]
    tree = {"properties": {"left": {"$ref": "#"}, "value": {"type": "string"}}}
    assert _inside(_tool(tree)).splitlines() == [
        "interface parameters {",
        "  left?: parameters,",
        "  value?: string",
        "}",
        "type f = (_: parameters) => any;",
    ]


def test_the_order_of_members_does_not_matter() -> None:
    # Agents that make their tools from hash maps would lose the cache of the whole prompt.
    one = {"properties": {"b": {"type": "string"}, "a": {"type": "integer"}}, "required": ["b"]}
    other = {"required": ["b"], "properties": {"a": {"type": "integer"}, "b": {"type": "string"}}}
    assert _declared(_tool(one)) == _declared(_tool(other))
    assert list(sorted_deeply({"b": [{"d": 1, "c": 2}], "a": 0})) == ["a", "b"]


@pytest.mark.parametrize(
    "schema",
    [
        {"oneOf": [{"type": "string"}]},
        {"const": 1},
        {"$ref": "#/$defs/Missing"},
        {"$ref": "other.json"},
        {"type": "string", "enum": [1]},
        {"type": ["date"]},
        {"type": "string", "description": 5},
        {"type": "object", "properties": []},
        {"type": "object", "required": "a"},
        "string",
    ],
)
def test_a_schema_without_such_a_form_leaves_all_tools_in_json(schema: Any) -> None:
    assert _declared(_tool({}), _tool({"properties": {"x": schema}})) is None


def test_hostile_depth_and_no_function() -> None:
    deep: dict[str, Any] = {}
    for _ in range(5000):
        deep = {"type": "array", "items": deep}
    assert typescript_declarations([_tool({"properties": {"x": deep}})]) is None
    assert _declared({"type": "web_search"}, {"type": "function"}) is None
    assert _inside(_tool(None), _tool({}, "g")).count("= (_: {}) => any;") == 2


class _Unsearched(list[str]):
    def __contains__(self, name: object) -> bool:
        raise AssertionError("each field would cost a search through all names")


def test_many_required_fields_cost_no_search_for_each() -> None:
    names = [f"p{number}" for number in range(50)]
    parameters = {
        "required": _Unsearched(names[10:]),
        "properties": {name: {"type": "string"} for name in names},
    }
    declared = typescript_declarations([_tool(parameters)])
    assert declared is not None
    assert declared.count("?: string") == 10
