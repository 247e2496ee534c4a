"""Patterns of strings that stand without quotes: those that the schema of a string asks for."""

from __future__ import annotations

import re
from collections.abc import Iterator

from k2cli.grammars.check import grammar_problem
from k2cli.grammars.text import ANY_TEXT, GrammarText, escaped
from k2cli.server.output.parameter_types import Schema
from k2cli.server.structured.call_forms.parameters import NotHeld, constraints
from k2cli.server.structured.formats import CLOCK_PATTERNS

_KNOWN = {"type", "enum", "const", "pattern", "minLength", "maxLength", "format"}
_MAX_LENGTH = 10_000
"""More letters than that are not counted: a text's length is held to by counting in the lexer."""

_BYTE = "(25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])"
_LABEL = "[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
_N = "[0-9]{1,9}"
_HOURS = f"({_N}H({_N}M({_N}S)?)?|{_N}M({_N}S)?|{_N}S)"
_DAYS = f"({_N}Y({_N}M({_N}D)?)?|{_N}M({_N}D)?|{_N}D)"
_GROUP = "[0-9a-fA-F]{1,4}"
_IPV6 = "|".join(
    [
        f"({_GROUP}:){{7}}{_GROUP}",
        f"({_GROUP}:){{1,7}}:",
        *(f"({_GROUP}:){{1,{7 - n}}}(:{_GROUP}){{1,{n}}}" for n in range(1, 7)),
        f":((:{_GROUP}){{1,7}}|:)",
    ]
)
_FORMATS = {
    "duration": f"P({_DAYS}(T{_HOURS})?|T{_HOURS}|{_N}W)",
    "ipv6": _IPV6,
    "uri": r"[A-Za-z][A-Za-z0-9+.-]{0,30}:([A-Za-z0-9._~:/?#@!$&'()*+,;=-]|%[0-9a-fA-F]{2})+",
    **CLOCK_PATTERNS,
    "uuid": "[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}",
    "ipv4": rf"{_BYTE}(\.{_BYTE}){{3}}",
    "hostname": rf"{_LABEL}(\.{_LABEL}){{0,8}}",
    "email": rf"[A-Za-z0-9_+-]+(\.[A-Za-z0-9_+-]+){{0,8}}@{_LABEL}(\.{_LABEL}){{1,8}}",
}
_CLASS = r"\[(?:\\.|\[(?:\\.|[^\]\\])*\]|[^\]\\])*\]"  # with classes within
_PART = re.compile(rf"\\.|{_CLASS}|[()|^$]|[^\\\[()|^$]+", re.DOTALL)


def text_patterns(schema: Schema, *, strict: bool) -> list[str]:
    """Return patterns in Rust's syntax that a text must match as a whole; none for any text.

    Raises:
        NotHeld: if ``strict`` and a constraint has none.
    """
    found: list[str] = []
    if not isinstance(schema, dict):
        return found
    if strict and (unknown := constraints(schema) - _KNOWN):
        raise NotHeld(f"{', '.join(sorted(unknown))} of a text without quotes")
    if "const" in schema or "enum" in schema:
        values = [schema["const"]] if "const" in schema else schema["enum"]
        if strict and constraints(schema) - {"type", "enum", "const"}:
            raise NotHeld("a list of values with other constraints")
        return ["|".join(escaped(value) for value in values if isinstance(value, str))]
    for make in (_pattern, _length, _format):
        try:
            found += make(schema)
        except NotHeld:
            if strict:
                raise
    return found


def _pattern(schema: dict[str, object]) -> Iterator[str]:
    if not isinstance(pattern := schema.get("pattern"), str):
        return
    whole = whole_pattern(pattern)
    text = GrammarText({})
    if (why := grammar_problem(text.build(text.text(whole)))) is not None:
        raise NotHeld(f"the pattern {pattern!r}: {why}")
    yield whole


def whole_pattern(pattern: str) -> str:
    """Return a pattern that matches the whole text where a schema's matches a part of it.

    Raises:
        NotHeld: if it has ``^`` or ``$`` elsewhere than at the ends of its alternatives.
    """
    alternatives: list[list[str]] = [[]]
    depth = 0
    for part in _PART.findall(pattern):
        depth += {"(": 1, ")": -1}.get(part, 0)
        if part == "|" and depth == 0:
            alternatives.append([])
        else:
            alternatives[-1].append(part)
    found = []
    for parts in alternatives:
        begins = parts[:1] == ["^"]
        ends = parts[begins:][-1:] == ["$"]
        inner = parts[begins : len(parts) - ends]
        if "^" in inner or "$" in inner:
            raise NotHeld(f"the pattern {pattern!r} has an anchor within")
        body = f"({''.join(inner)})"
        found.append(f"{'' if begins else ANY_TEXT}{body}{'' if ends else ANY_TEXT}")
    return "|".join(found)


def _length(schema: dict[str, object]) -> Iterator[str]:
    least, most = schema.get("minLength", 0), schema.get("maxLength")
    if not isinstance(least, int | float) or not isinstance(most, int | float | None):
        return
    if max(least, most or 0) > _MAX_LENGTH:
        raise NotHeld(f"a length of more than {_MAX_LENGTH}")
    if least > 0 or most is not None:
        yield f"(?s:.{{{int(least)},{'' if most is None else int(most)}}})"


def _format(schema: dict[str, object]) -> Iterator[str]:
    name = schema.get("format")
    if not isinstance(name, str):
        return
    if name not in _FORMATS:
        raise NotHeld(f"the format {name!r} of a text without quotes")
    yield _FORMATS[name]
