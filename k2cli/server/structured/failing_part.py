"""Search for the part of a schema that llguidance does not compile.

Its errors seldom say where: parts are compiled on their own until the smallest one is found.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

from k2cli.grammars.check import grammar_problem
from k2cli.grammars.text import GrammarText
from k2cli.server.structured.normal_form import NormalSchema, children
from k2cli.server.structured.rewriting import Schema
from k2cli.server.structured.schema_problem import SchemaProblem, shown

MAX_CLEARED = 20
"""Parts that are left out of one schema."""
MAX_TRIES = 200
MAX_SECONDS = 2.0
"""Bounds of the search; what it has found by then is the place."""

_PREFIX = "Unsatisfiable schema: "


def schema_problem(found: NormalSchema, *, lenient: bool = False) -> SchemaProblem | None:
    """Compile a schema, and return what is wrong with its smallest failing part, or None.

    Args:
        found: the schema.
        lenient: True to let such parts allow any value, as long as that helps.
    """
    for _ in range(MAX_CLEARED if lenient else 1):
        error = _error(found, found.root)
        if error is None:
            return None
        problem, part = _Search(found).smallest(found.root, "", error)
        if not lenient or not part or isinstance(part, bool):
            return problem
        part.clear()
    return problem


def _error(found: NormalSchema, part: Schema | bool) -> str | None:
    text = GrammarText({})
    return grammar_problem(text.build(text.json(found.schema_of(part))))


class _Search:
    """One search, with its bounds."""

    def __init__(self, found: NormalSchema) -> None:
        self._found = found
        self._tries = MAX_TRIES
        self._end = time.monotonic() + MAX_SECONDS
        self._seen: set[int] = set()

    def smallest(
        self, part: Schema | bool, place: str, error: str
    ) -> tuple[SchemaProblem, Schema | bool]:
        """Return the problem of the smallest part within a failing one, and that part."""
        while isinstance(part, dict):
            for pointer, child in self._parts(part, place):
                inner = self._try(child)
                if inner is not None and _explains(inner, error):
                    if child is False and (name := _excluded(part)) is not None:
                        reason = f"{shown(name)} is required, and 'properties' does not have it"
                        return SchemaProblem(f"{place}/required", reason), child
                    part, place, error = child, pointer, inner
                    break
            else:
                break
        return SchemaProblem(place, _reason(error, part, self._found.patterns)), part

    def _parts(self, part: Schema, place: str) -> Iterator[tuple[str, Schema | bool]]:
        """Yield the parts of a part, and what it refers to, with their places."""
        places = self._found.places
        for pointer, child in children(part):
            yield places.get(id(child), place + pointer), child
        if "$ref" in part:
            target = self._found.target(part["$ref"])
            yield places.get(id(target), place), target

    def _try(self, part: Schema | bool) -> str | None:
        if part is True or self._tries <= 0 or time.monotonic() > self._end:
            return None
        if part is False:
            return f"{_PREFIX}no value is allowed"
        if id(part) in self._seen:
            return None
        self._seen.add(id(part))
        self._tries -= 1
        return _error(self._found, part)


def _explains(inner: str, outer: str) -> bool:
    """Return True if the error of a part is the cause of that of the whole.

    A part that no value matches fails on its own, but not the whole if it is optional there.
    """
    return _first_line(inner) in outer or (
        inner.startswith(_PREFIX) and outer.startswith(_PREFIX) and "unsatisfiable" in outer
    )


def _excluded(part: Schema) -> str | None:
    """Return a required name that is no property, where no other names are allowed; else None."""
    if part.get("additionalProperties") is not False or part.get("patternProperties"):
        return None
    names = part.get("required") or []
    return next((name for name in names if name not in part.get("properties", {})), None)


def _first_line(error: str) -> str:
    return error.partition("\n")[0]


def _reason(error: str, part: Schema | bool, patterns: dict[str, str]) -> str:
    if error.startswith("regex parse error") or " in regex /" in error:
        cause = error.rpartition("error: ")[2].partition(" in regex /")[0].strip()
        if isinstance(part, dict) and "pattern" in part:
            pattern = patterns.get(part["pattern"], part["pattern"])
            return f"the pattern {shown(pattern)} cannot be held: {cause}"
        return f"a pattern cannot be held: {cause}"
    text = error.partition("\n  while processing")[0].removeprefix(_PREFIX)
    if text.startswith("Regex is empty"):
        return "no text has all that it asks for"
    if text == "incompatible types":
        return f"{text}: no value is of all those that it asks for"
    return " ".join(text.split())[:300]
