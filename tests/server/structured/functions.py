"""Functions whose calls are held to grammars in tests."""

from __future__ import annotations

from typing import Any

from k2cli.server.structured.calls import Function


def function(name: str, properties: dict[str, Any], *required: str, **more: Any) -> Function:
    schema = {"type": "object", "properties": properties, "required": list(required), **more}
    return Function(name, schema, strict=True)


def fixed(schema: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"type": "object", "properties": schema, "additionalProperties": False, **more}


NODE = {
    "type": "object",
    "properties": {
        "value": {"type": "integer"},
        "children": {"type": "array", "items": {"$ref": "#/$defs/node"}, "maxItems": 2},
    },
    "required": ["value"],
    "additionalProperties": False,
}

FUNCTIONS = (
    function(
        "read_file",
        {"path": {"type": "string"}, "limit": {"type": "integer", "minimum": 1, "maximum": 500}},
        "path",
        additionalProperties=False,
    ),
    function(
        "set_mode",
        {
            "mode": {"enum": ["fast", "slow", "größer 巴黎"]},
            "level": {"type": "number", "minimum": -1.5, "maximum": 2},
            "on": {"type": "boolean"},
            "kind": {"const": "a b"},
        },
        "mode",
        "on",
        additionalProperties=False,
    ),
    function(
        "edit",
        {
            "edits": {
                "type": "array",
                "items": fixed({"old": {"type": "string"}, "new": {"type": ["string", "null"]}}),
                "minItems": 1,
                "maxItems": 2,
            },
            "über": fixed({"schlüssel": {"type": "string", "maxLength": 5}}),
        },
        "edits",
        additionalProperties=False,
    ),
    function(
        "tree",
        {"root": {"$ref": "#/$defs/node"}},
        "root",
        additionalProperties=False,
        **{"$defs": {"node": NODE}},
    ),
    function("now", {}, additionalProperties=False),
)

ROOT_REFERENCE = Function("root", {"$ref": "#/$defs/node", "$defs": {"node": NODE}}, strict=True)
OWN_ROOT = function(
    "own",
    {"name": {"enum": ["x"]}, "next": {"anyOf": [{"$ref": "#"}, {"type": "null"}]}},
    "name",
    additionalProperties=False,
)
SHORT_TEXT = function(
    "short",
    {
        "code": {"type": "string", "pattern": "^[a-z]+-[0-9]{2}$"},
        "title": {"type": "string", "minLength": 2, "maxLength": 4},
    },
    "code",
    additionalProperties=False,
)
UNION = function(
    "union",
    {
        "either": {"anyOf": [{"type": "string"}, {"type": "integer"}]},
        "maybe": {"type": ["string", "null"]},
        "auto": {"anyOf": [{"const": "auto"}, {"type": "integer", "minimum": 3}]},
        "many": {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "integer"}}]},
    },
    "either",
    additionalProperties=False,
)
ANY = Function("anything", None)
LOOSE = Function("loose", {"properties": {"a": {"type": "string"}}, "required": ["a"]})
EVERY = (*FUNCTIONS, ROOT_REFERENCE, OWN_ROOT, SHORT_TEXT, UNION, ANY, LOOSE)
