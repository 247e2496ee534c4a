"""Declarations of tools in TypeScript, as Kimi K2.5 and its successors were trained on them.

The chat template of these models has a variable ``tools_ts_str`` for them, which the tokenizer code
in their repositories fills. This module makes the same text from the same JSON schemas. A schema
that has no such form, such as one with ``oneOf``, makes that code fall back to JSON for all tools
of the request, and so it does here.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

_INDENT = "  "
_BETWEEN_FIELDS = ",\n"
_ROOT = "parameters"
_DEFINITIONS = "#/$defs/"
_NAMES_IN_LISTS = {
    "string": "string",
    "number": "number",
    "integer": "number",
    "boolean": "boolean",
    "null": "null",
    "object": "{}",
    "array": "Array<any>",
}
# Limits of values, which are shown in comments.
_LIMITS = {
    "string": ("maxLength", "minLength", "pattern"),
    "number": ("maximum", "minimum"),
    "integer": ("maximum", "minimum"),
    "array": ("maxItems", "minItems"),
}
_ENUM_VALUES: dict[str, type | tuple[type, ...]] = {
    "string": str,
    "number": (int, float),
    "integer": int,
    "boolean": bool,
}


class _Inexpressible(Exception):
    """The schema has no form in TypeScript."""


def sorted_deeply(value: Any) -> Any:
    """Sort the members of all objects by name, as the models' own code does before rendering."""
    if isinstance(value, dict):
        return {name: sorted_deeply(value[name]) for name in sorted(value)}
    if isinstance(value, list):
        return [sorted_deeply(item) for item in value]
    return value


def typescript_declarations(tools: list[dict[str, Any]]) -> str | None:
    """Declare tools, which are in OpenAI's form and sorted deeply.

    Returns:
        The text for ``tools_ts_str``; None if a schema has no such form, or there is no function.
    """
    functions = [
        function
        for tool in tools
        if tool.get("type") == "function"
        and isinstance(function := tool.get("function"), dict)
        and function
    ]
    try:
        declared = [_Declaration().function(function) for function in functions]
    except (_Inexpressible, RecursionError):
        return None
    if not declared:
        return None
    body = "\n".join(declared)
    return f"# Tools\n\n## functions\nnamespace functions {{\n{body}\n}}\n"


@dataclass(slots=True)
class _Declaration:
    """One function's declaration; ``definitions`` are the named schemas met so far."""

    definitions: dict[str, Any] = field(default_factory=dict)
    refers_to_root: bool = False

    def function(self, function: dict[str, Any]) -> str:
        name = function.get("name", "function")
        schema = function.get("parameters") or {}
        if not isinstance(schema, dict):
            raise _Inexpressible
        fields = self._fields(schema, "")
        interfaces = []
        argument = self._object(schema, fields, "")
        if self.refers_to_root:
            # Its fields stand in the order of the schema, without those of any name.
            inner = _BETWEEN_FIELDS.join(text for _, text in fields)
            interfaces.append(f"interface {_ROOT} {{" + (f"\n{inner}\n" if inner else "") + "}")
            argument = _ROOT
        for defined, of in list(self.definitions.items()):
            text = self._type(of, "")
            if not isinstance(of, dict):
                raise _Inexpressible
            comment = _comment(of.get("description") or "", "")
            interfaces.append(f"{comment}interface {defined} {text}")
        comment = _comment(function.get("description") or "", "")
        declared = f"{comment}type {name} = (_: {argument}) => any;"
        return "\n".join([*interfaces, declared])

    def _type(self, schema: Any, indent: str) -> str:
        if isinstance(schema, bool):
            return "any" if schema else "null"
        if not isinstance(schema, dict):
            raise _Inexpressible
        if "$ref" in schema:
            return self._reference(schema["$ref"])
        if isinstance(schema.get("anyOf"), list):
            return " | ".join([self._type(each, indent) for each in schema["anyOf"]])
        if "enum" in schema:
            return _enumeration(schema)
        kind = schema.get("type")
        if isinstance(kind, list):
            return " | ".join(_named_in_list(each) for each in kind)
        if kind == "object":
            return self._object(schema, self._fields(schema, indent), indent)
        if kind == "array":
            return self._array(schema, indent)
        if isinstance(kind, str):
            return "number" if kind == "integer" else kind
        if schema:
            raise _Inexpressible
        return "any"

    def _reference(self, reference: Any) -> str:
        if reference == "#":
            self.refers_to_root = True
            return _ROOT
        name = str(reference).rpartition("/")[2]
        known = isinstance(self.definitions.get(name), dict)
        if not str(reference).startswith(_DEFINITIONS) or not known:
            raise _Inexpressible
        return name

    def _fields(self, schema: dict[str, Any], indent: str) -> list[tuple[tuple[bool, str], str]]:
        """Return the fields of an object in the order of the schema, with what they sort by."""
        definitions, properties = schema.get("$defs") or {}, schema.get("properties", {})
        required = schema.get("required", [])
        if not all(isinstance(part, dict) for part in (definitions, properties)):
            raise _Inexpressible
        if not isinstance(required, list):
            raise _Inexpressible
        self.definitions |= definitions
        names = {name for name in required if isinstance(name, str)}
        fields = []
        for name, of in properties.items():
            optional = name not in names
            inner = indent + _INDENT
            text = f"{inner}{name}{'?' if optional else ''}: {self._type(of, inner)}"
            fields.append(((optional, name), _notes(of, inner) + text))
        return fields

    def _object(
        self, schema: dict[str, Any], fields: list[tuple[tuple[bool, str], str]], indent: str
    ) -> str:
        texts = [text for _, text in sorted(fields)]
        others = schema.get("additionalProperties")
        if others is not None:
            kind = "never" if others is False else self._type(others, indent + _INDENT)
            texts.append(f"{indent}{_INDENT}[k: string]: {kind}")
        return f"{{\n{_BETWEEN_FIELDS.join(texts)}\n{indent}}}" if texts else "{}"

    def _array(self, schema: dict[str, Any], indent: str) -> str:
        item = schema.get("items") or True
        inner = indent + _INDENT
        notes = _description_and_limits(item, inner)
        if notes:
            return f"Array<\n{notes}{inner}{self._type(item, inner)}\n{indent}>"
        return f"Array<{self._type(item, indent)}>"


def _named_in_list(kind: Any) -> str:
    if not isinstance(kind, str) or kind not in _NAMES_IN_LISTS:
        raise _Inexpressible
    return _NAMES_IN_LISTS[kind]


def _enumeration(schema: dict[str, Any]) -> str:
    values, kind = schema["enum"], schema.get("type")
    if isinstance(kind, list):
        others = [each for each in kind if each != "null"]
        if not (len(kind) == 1 or (len(kind) == 2 and len(others) < 2)):
            raise _Inexpressible
        kind = others[0] if others else "null"
    allowed = _ENUM_VALUES.get(kind, object) if isinstance(kind, str) else object
    if not isinstance(values, list) or not all(
        value is None or isinstance(value, allowed) for value in values
    ):
        raise _Inexpressible
    # Other values than texts have Python's form: True, None.
    return " | ".join(f'"{value}"' if isinstance(value, str) else str(value) for value in values)


def _notes(schema: Any, indent: str) -> str:
    """Make the comment lines above a field."""
    notes = _description_and_limits(schema, indent)
    default = schema.get("default") if isinstance(schema, dict) else None
    if default is None:
        return notes
    text = repr(default) if isinstance(default, int | float) else _json(default)
    return f"{notes}{indent}// Default: {text}\n"


def _description_and_limits(schema: Any, indent: str) -> str:
    if not isinstance(schema, dict):
        return ""
    notes = _comment(schema.get("description") or "", indent)
    special = "$ref" in schema or "anyOf" in schema or "enum" in schema
    kind = schema.get("type")
    names = _LIMITS.get(kind, ()) if isinstance(kind, str) and not special else ()
    limits = ", ".join(f"{name}: {schema[name]}" for name in names if name in schema)
    return f"{notes}{indent}// {limits}\n" if limits else notes


def _comment(text: Any, indent: str) -> str:
    if not isinstance(text, str):
        raise _Inexpressible
    lines = text.split("\n") if text else []
    return "".join(f"{indent}// {line}\n" if line else "\n" for line in lines)


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
