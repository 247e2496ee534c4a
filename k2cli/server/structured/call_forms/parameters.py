"""Parameters of functions: the schema of each, and its parts, for formats that write them apart."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from k2cli.server.output.parameter_types import STRING, Schema, TypeFinder, target

MAX_BRANCHES = 64
_NOTES = {"title", "description", "default", "examples", "example", "deprecated", "readOnly"}
_NOTES |= {"writeOnly", "$comment", "$schema", "$id", "$defs", "definitions", "x-guidance"}
_NOT_OFFERED = {"additionalProperties", "unevaluatedProperties", "patternProperties"}
_OBJECT = {"type", "properties", "required"}


class NotHeld(Exception):
    """A schema that a format cannot be held to; the text says why."""


@dataclass(frozen=True, slots=True)
class Parameters:
    """Parameters of a function: their schemas, in the order of the schema, and the required ones.

    A required parameter without a schema may have any value.
    """

    schemas: dict[str, Schema]
    required: frozenset[str] = frozenset()


def constraints(schema: Schema) -> set[str]:
    """Return the keywords of a schema that are more than notes."""
    return set(schema) - _NOTES if isinstance(schema, dict) else set()


class Branches:
    """Finder of the alternatives that a schema consists of, within one whole schema."""

    def __init__(self, root: object) -> None:
        self._root = root
        self.types: Callable[[object], frozenset[str]] = TypeFinder(root).types

    def of(self, schema: Schema, references: tuple[str, ...] = ()) -> list[Schema]:
        """Return schemas of which a value obeys one; a schema that is no union is its own.

        Those of ``type`` and ``enum`` with several types are split, so that each allows strings
        alone, or none, or else is not understood.

        Raises:
            NotHeld: if there are too many.
        """
        found = self._of(schema, references)
        if len(found) > MAX_BRANCHES:
            raise NotHeld(f"it has more than {MAX_BRANCHES} alternatives")
        return found

    def _of(self, schema: Schema, references: tuple[str, ...]) -> list[Schema]:
        if not isinstance(schema, dict):
            return [{}] if schema else []
        named = constraints(schema)
        if named == {"$ref"}:
            reference = schema["$ref"]
            part = None if reference in references else target(self._root, reference)
            return [schema] if part is None else self.of(part, (*references, reference))
        if named == {"allOf"} and _length(schema["allOf"]) == 1:
            return self.of(schema["allOf"][0], references)
        if len(named) == 1 and (key := next(iter(named))) in ("anyOf", "oneOf"):
            if not isinstance(schema[key], list):
                return [schema]
            return [part for branch in schema[key] for part in self.of(branch, references)]
        return self._of_types(schema)

    def _of_types(self, schema: dict[str, Any]) -> list[Schema]:
        types = self.types(schema)
        if STRING not in types or types == {STRING} or not constraints(schema) <= _SPLIT:
            return [schema]
        if isinstance(values := schema.get("enum"), list):
            strings = [value for value in values if isinstance(value, str)]
            others = [value for value in values if not isinstance(value, str)]
            return [{**schema, "enum": strings}, {**schema, "enum": others}]
        if not constraints(schema):
            return [schema]
        if "number" in types:
            types -= {"integer"}
        return [
            {key: schema[key] for key in schema if key in _KEYWORDS[kind]} | {"type": kind}
            for kind in sorted(types)
        ]


_NUMBERS = {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"}
_KEYWORDS: dict[str, set[str]] = {
    STRING: {"pattern", "minLength", "maxLength", "format", "contentMediaType", "contentEncoding"},
    "integer": _NUMBERS,
    "number": _NUMBERS,
    "boolean": set(),
    "null": set(),
    "array": {"items", "prefixItems", "minItems", "maxItems", "uniqueItems", "contains"},
    "object": {"properties", "required", "minProperties", "maxProperties", "propertyNames"}
    | _NOT_OFFERED,
}
"""Keywords that hold for values of one type alone."""
_SPLIT = {"type", "enum"}.union(*_KEYWORDS.values())


def parameter_sets(root: dict[str, Any] | None, *, strict: bool) -> list[Parameters]:
    """Return the sets of parameters that a function takes; one, unless its schema is a union.

    Args:
        root: the schema of all arguments.
        strict: False to leave out what cannot be expressed.

    Raises:
        NotHeld: if ``strict`` and the schema relates parameters to each other.
    """
    if not root:
        return [Parameters({})]
    branches = Branches(root)
    named = constraints(root) - _NOT_OFFERED
    if "anyOf" in named and named <= {"anyOf"} | _OBJECT and isinstance(root["anyOf"], list):
        alternatives = [part for part in root["anyOf"] if constraints(part) == {"required"}]
        if alternatives and len(alternatives) == len(root["anyOf"]):
            base = {key: value for key, value in root.items() if key != "anyOf"}
            return [
                _parameters(base, _names(part["required"]), strict=strict) for part in alternatives
            ]
    for key in ("anyOf", "oneOf", "allOf", "$ref"):
        if key in named <= {key, "type"}:
            parts = branches.of({key: root[key]})
            objects = [part for part in parts if "object" in branches.types(part)]
            found = [_parameters(part, (), strict=strict) for part in objects]
            if strict:
                _check_types(found, branches)
            return found
    return [_parameters(root, (), strict=strict)]


def _check_types(sets: Sequence[Parameters], branches: Branches) -> None:
    """Check that the parser can tell a parameter's types by its name alone."""
    known: dict[str, frozenset[str]] = {}
    for each in sets:
        for key, schema in each.schemas.items():
            types = branches.types(schema)
            if known.setdefault(key, types) != types:
                raise NotHeld(f"its parameter '{key}' has several types in a union")


def _parameters(schema: Schema, required: Sequence[str], *, strict: bool) -> Parameters:
    unknown = constraints(schema) - _NOT_OFFERED - _OBJECT
    if strict and unknown:
        names = ", ".join(map(repr, sorted(unknown)))
        raise NotHeld(f"its parameters are written one by one, to which {names} cannot apply")
    members = schema if isinstance(schema, dict) else {}
    required = [*_names(members.get("required")), *required]
    properties = members.get("properties")
    schemas: dict[str, Schema] = dict(properties) if isinstance(properties, dict) else {}
    schemas |= {name: True for name in required if name not in schemas}
    return Parameters(schemas, frozenset(required))


def _names(value: object) -> Sequence[str]:
    return [name for name in value if isinstance(name, str)] if isinstance(value, list) else []


def _length(value: object) -> int:
    return len(value) if isinstance(value, list) else 0


_MAPS = ("properties", "patternProperties", "dependentSchemas")
_DEFINITIONS = ("$defs", "definitions")
_VALUES = ("const", "enum", "default", "examples")


def standalone(schema: Schema, root: object) -> Schema:
    """Return a part of a schema as one of its own: the parts that it refers to come along."""
    names: dict[str, str] = {}
    waiting: list[str] = []

    def moved(part: Any) -> Any:
        if isinstance(part, list):
            return [moved(item) for item in part]
        if not isinstance(part, dict):
            return part
        # Definitions are reached by the references to them.
        return {key: member(key, part[key]) for key in part if key not in _DEFINITIONS}

    def member(key: str, value: Any) -> Any:
        if key == "$ref" and target(root, value) is not None:
            if value not in names:
                names[value] = f"part{len(names)}"
                waiting.append(value)
            return f"#/$defs/{names[value]}"
        if key in _MAPS and isinstance(value, dict):
            return {name: moved(part) for name, part in value.items()}
        return value if key in _VALUES else moved(value)

    found: Schema = moved(schema)
    parts: dict[str, Any] = {}
    while waiting:
        reference = waiting.pop()
        parts[names[reference]] = moved(target(root, reference))
    return {**found, "$defs": parts} if isinstance(found, dict) and parts else found
