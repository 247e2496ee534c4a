"""JSON types that the schema of a parameter allows, for values that are written without quotes."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from typing import Any

from k2cli.server.json_pointer import pointer_of_fragment, value_at

Schema = dict[str, Any] | bool

STRING = "string"
_NARROWING = {"type", "enum", "const", "$ref", "anyOf", "oneOf", "allOf"}
TYPES = frozenset({STRING, "integer", "number", "boolean", "object", "array", "null"})


def target(root: object, reference: object) -> Schema | None:
    """Return the part of a schema that a ``$ref`` within it names; None if it names none."""
    if not isinstance(reference, str) or not (reference == "#" or reference.startswith("#/")):
        return None
    try:
        found = value_at(root, pointer_of_fragment(reference))
    except LookupError:
        return None
    return found if isinstance(found, dict | bool) else None


def type_of(value: object) -> str:
    """Return the JSON type of a value; whole numbers are integers."""
    match value:
        case bool():
            return "boolean"
        case int():
            return "integer"
        case float():
            return "integer" if value.is_integer() else "number"
        case str():
            return STRING
        case None:
            return "null"
        case dict():
            return "object"
    return "array"


class TypeFinder:
    """Finder of the types that parts of one schema allow: never too few, at times too many.

    Args:
        root: the whole schema, in which ``$ref`` points.
    """

    def __init__(self, root: object) -> None:
        self._root = root
        self._known: dict[str, frozenset[str]] = {}

    def types(self, schema: object) -> frozenset[str]:
        """Return the types that a schema allows."""
        if schema is False:
            return frozenset()
        if not isinstance(schema, dict):
            return TYPES
        found = TYPES
        if "type" in schema:
            named = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
            found = frozenset(name for name in named if name in TYPES)
            if "number" in found:
                found |= {"integer"}
        if isinstance(values := schema.get("enum"), list):
            found &= frozenset(map(type_of, values))
        if "const" in schema:
            found &= {type_of(schema["const"])}
        if isinstance(reference := schema.get("$ref"), str):
            found &= self._types_of_reference(reference)
        for key in ("anyOf", "oneOf"):
            if isinstance(branches := schema.get(key), list):
                found &= self._any(branches)
        if isinstance(parts := schema.get("allOf"), list):
            for part in parts:
                found &= self.types(part)
        return found

    def _any(self, branches: Iterable[object]) -> frozenset[str]:
        return frozenset().union(*map(self.types, branches))

    def _types_of_reference(self, reference: str) -> frozenset[str]:
        if reference not in self._known:
            self._known[reference] = TYPES  # within a reference to itself
            part = target(self._root, reference)
            self._known[reference] = TYPES if part is None else self.types(part)
        return self._known[reference]


def declared_types(tools: list[dict[str, Any]], name: str, key: str) -> frozenset[str] | None:
    """Return the types of a function's parameter; None if it is not declared or not limited."""
    for tool in tools:
        function = tool.get("function")
        if not isinstance(function, dict) or function.get("name") != name:
            continue
        root = function.get("parameters")
        schemas = list(_schemas_of(key, root, root, set()))
        if not schemas or not all(set(schema) & _NARROWING for schema in schemas):
            return None
        return frozenset().union(*map(TypeFinder(root).types, schemas))
    return None


def _schemas_of(
    key: str, part: object, root: object, references: set[str]
) -> Iterator[dict[str, Any]]:
    """Return the schemas of a parameter in a schema of all arguments, which may be a union."""
    if not isinstance(part, dict):
        return
    properties = part.get("properties")
    if isinstance(properties, dict) and isinstance(schema := properties.get(key), dict):
        yield schema
    reference = part.get("$ref")
    if isinstance(reference, str) and reference not in references:
        references.add(reference)
        yield from _schemas_of(key, target(root, reference), root, references)
    for name in ("anyOf", "oneOf", "allOf"):
        branches = part.get(name)
        for branch in branches if isinstance(branches, list) else ():
            yield from _schemas_of(key, branch, root, references)


def value_of_text(text: str, types: frozenset[str] | None) -> list[object]:
    """Return the value that a text without quotes has for a parameter; nothing if not certain.

    Where several types are possible, a text is the JSON value of one of them, or else a string.
    """
    if types is None:
        return []
    if types == {STRING}:
        return [text]
    for value in _json_value(text):
        kind = type_of(value)
        if kind in types and kind != STRING:
            whole = isinstance(value, float) and kind == "integer" and "number" not in types
            return [int(value) if whole else value]
    return [text] if STRING in types else []


def _json_value(text: str) -> list[Any]:
    try:
        value = json.loads(text, parse_constant=_no_json)
    except (ValueError, RecursionError):
        return []
    return [] if isinstance(value, float) and not math.isfinite(value) else [value]


def _no_json(name: str) -> None:
    raise ValueError(name)
