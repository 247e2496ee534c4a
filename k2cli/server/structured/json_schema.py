"""Checks of a client's JSON schema before anything uses it, and a cache of those that were read.

Agents send the same tools with every request, so that a schema is read once in the life of the
reader process.
"""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from k2cli.grammars.check import grammar_problem
from k2cli.server.errors import invalid
from k2cli.server.structured.alternatives import replace_one_of
from k2cli.server.structured.expansion import check_expansion
from k2cli.server.structured.failing_part import schema_problem
from k2cli.server.structured.normal_form import NormalSchema, normal_form
from k2cli.server.structured.schema_problem import SchemaProblem

MAX_SCHEMA_BYTES = 512 * 1024
"""The JSON text of one schema, with its descriptions."""

_CACHED_BYTES = 16 * 1024 * 1024
_Value = TypeVar("_Value")


class BoundedCache(Generic[_Value]):
    """A cache of the values that were used last.

    Args:
        max_bytes: the most that the values may have in all, as their users count them.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._bytes = 0
        self._values: OrderedDict[bytes, tuple[_Value, int]] = OrderedDict()

    def get(self, key: bytes) -> _Value | None:
        """Return a value that is cached, or None."""
        found = self._values.get(key)
        if found is None:
            return None
        self._values.move_to_end(key)
        return found[0]

    def put(self, key: bytes, value: _Value, size: int) -> None:
        """Add a value, and drop those that were not used for longest."""
        if key in self._values or size > self._max_bytes:
            return
        self._values[key] = (value, size)
        self._bytes += size
        while self._bytes > self._max_bytes:
            self._bytes -= self._values.popitem(last=False)[1][1]


@dataclass(frozen=True, slots=True)
class CheckedSchema:
    """A schema that can be held, or what is wrong with it."""

    normal: NormalSchema
    problem: SchemaProblem | None = None

    @property
    def schema(self) -> dict[str, Any]:
        """The schema in its normal form, with its definitions."""
        return self.normal.schema_of(self.normal.root)


# Of the process: it reads requests of one model, and schemas do not depend on the model.
_checked: BoundedCache[CheckedSchema] = BoundedCache(_CACHED_BYTES)
_problems: BoundedCache[str] = BoundedCache(_CACHED_BYTES)


def checked_schema(
    schema: Any, place: str, *, param: str | None = None, lenient: bool = False
) -> dict[str, Any]:
    """Return a schema in the form that ``GrammarText.json`` takes.

    Args:
        schema: the client's.
        place: where it stands in the client's body, for messages.
        param: the field that an error names; None for the place.
        lenient: True to leave out what cannot be held.

    Raises:
        ApiError: 400 that names the part that is not valid or cannot be held.
    """
    param = param or place
    found = _read(schema, place, param, lenient=lenient)
    if found.problem is None:
        return found.schema
    raise invalid(f"{place}{found.problem.pointer}: {found.problem.reason}", param)


def compile_problem(grammar: str) -> str | None:
    """Compile a grammar, unless it is known; return what is wrong with it, or None."""
    key = hashlib.sha256(grammar.encode(errors="replace")).digest()
    known = _problems.get(key)
    if known is None:
        known = grammar_problem(grammar) or ""
        _problems.put(key, known, len(known) + 200)
    return known or None


def _read(schema: Any, place: str, param: str, *, lenient: bool) -> CheckedSchema:
    try:
        text = json.dumps(schema, ensure_ascii=False, separators=(",", ":")).encode(
            errors="replace"
        )
    except (RecursionError, ValueError):
        raise invalid(f"{place}: nests too deeply", param) from None
    if len(text) > MAX_SCHEMA_BYTES:
        message = f"{place}: has {len(text)} bytes, and the most are {MAX_SCHEMA_BYTES}"
        raise invalid(message, param)
    key = hashlib.sha256(bytes([lenient]) + text).digest()
    found = _checked.get(key)
    if found is None:
        found = _checked_now(schema, lenient=lenient)
        _checked.put(key, found, 4 * len(text) + 1000)
    return found


def _checked_now(schema: Any, *, lenient: bool) -> CheckedSchema:
    try:
        normal = normal_form(schema, lenient=lenient)
        replace_one_of(normal, lenient=lenient)
        check_expansion(normal)
    except SchemaProblem as problem:
        return CheckedSchema(NormalSchema(), problem)
    return CheckedSchema(normal, schema_problem(normal, lenient=lenient))
