"""Forms of fields that the dialects read by hand, so that their types say only "an object".

They may allow what is refused later, such as a schema that cannot be held, but forbid nothing that
is accepted: schemathesis sends what they forbid, and expects a refusal.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_SCHEMA: dict[str, Any] = {"type": ["object", "boolean"]}
_TEXT: dict[str, Any] = {"type": "string", "minLength": 1}
_NULLABLE_TEXT: dict[str, Any] = {"type": ["string", "null"]}
_NULL: dict[str, Any] = {"type": "null"}

_NAMED_SCHEMA: dict[str, Any] = {
    "schema": _SCHEMA,
    "name": _NULLABLE_TEXT,
    "description": _NULLABLE_TEXT,
    "strict": {"type": ["boolean", "null"]},
}


def _tagged(kind: str, required: list[str], **properties: Any) -> dict[str, Any]:
    """Return the form of an object with a member ``type``."""
    members = {"type": {"const": kind}, **properties}
    return {"type": "object", "properties": members, "required": ["type", *required]}


def _named(properties: Mapping[str, Any], *required: str) -> dict[str, Any]:
    return {"type": "object", "properties": dict(properties), "required": list(required)}


_FORMAT: dict[str, Any] = {
    "anyOf": [
        _tagged("text", []),
        _tagged("json_object", [], schema={"anyOf": [_SCHEMA, _NULL]}),
        _tagged("json_schema", ["json_schema"], json_schema=_named(_NAMED_SCHEMA, "schema")),
        _tagged("json_schema", ["schema"], **_NAMED_SCHEMA),
        _tagged("regex", ["regex"], regex=_TEXT),
        _tagged("grammar", ["grammar"], grammar=_TEXT, syntax={"enum": ["lark", "gbnf", None]}),
        _NULL,
    ]
}
_MESSAGES_FORMAT: dict[str, Any] = {
    "anyOf": [_tagged("json_schema", ["schema"], schema=_SCHEMA), _NULL]
}
_TEXTS: dict[str, Any] = {"type": "array", "items": _TEXT, "minItems": 1}
_JSON: dict[str, Any] = {"type": ["object", "boolean", "string", "null"]}
_STRUCTURED: dict[str, Any] = {
    "type": ["object", "null"],
    "properties": {
        "json": _JSON,
        "regex": {"anyOf": [_TEXT, _NULL]},
        "choice": {"anyOf": [_TEXTS, _NULL]},
        "grammar": {"anyOf": [_TEXT, _NULL]},
        "json_object": {"type": ["boolean", "null"]},
    },
}
_FUNCTION: dict[str, Any] = {
    "anyOf": [
        _tagged("function", ["function"], function=_named({"name": _TEXT}, "name")),
        _tagged("function", ["name"], name=_TEXT),
    ]
}
_ALLOWED: dict[str, Any] = {
    "mode": {"enum": ["auto", "required"]},
    "tools": {"type": "array", "items": _FUNCTION, "minItems": 1},
}
_TOOL_CHOICE: dict[str, Any] = {
    "anyOf": [
        {"enum": ["auto", "none", "required", None]},
        *_FUNCTION["anyOf"],
        _tagged("allowed_tools", ["allowed_tools"], allowed_tools=_named(_ALLOWED, "tools")),
        _tagged("allowed_tools", ["tools"], **_ALLOWED),
    ]
}
_OPENAI: dict[str, dict[str, Any]] = {
    "response_format": _FORMAT,
    "structured_outputs": _STRUCTURED,
    "guided_json": _JSON,
    "guided_regex": {"anyOf": [_TEXT, _NULL]},
    "guided_choice": {"anyOf": [_TEXTS, _NULL]},
    "guided_grammar": {"anyOf": [_TEXT, _NULL]},
    "json_schema": {"anyOf": [_SCHEMA, _NULL]},
}

FORMS: Mapping[str, Mapping[str, dict[str, Any]]] = {
    "ChatCompletionBody": {**_OPENAI, "tool_choice": _TOOL_CHOICE},
    "CompletionBody": _OPENAI,
    "ResponsesBody": {"tool_choice": _TOOL_CHOICE},
    "TextOptions": {"format": _FORMAT},
    "MessagesBody": {"output_format": _MESSAGES_FORMAT},
    "OutputConfig": {"format": _MESSAGES_FORMAT},
}
"""Forms by the name of the type and of the member. A member that is gone is left out."""
