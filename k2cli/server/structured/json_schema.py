"""Checks of a client's JSON schema before anything uses it.

Agents send the same tools with every request, so that a schema is read once in the life of the
reader process.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any

from k2cli.bounded_cache import BoundedCache
from k2cli.server.errors import invalid
from k2cli.server.structured.alternatives import replace_one_of
from k2cli.server.structured.expansion import check_expansion
from k2cli.server.structured.failing_part import schema_problem
from k2cli.server.structured.normal_form import NormalSchema, normal_form
from k2cli.server.structured.schema_problem import SchemaProblem

MAX_SCHEMA_BYTES = 512 * 1024
"""The JSON text of one schema, with its descriptions."""

_WITH_STRICT = ("response_format.json_schema", "text.format", "tools[")
"""Beginnings of the places of schemas that have a member ``strict`` beside them."""

_CACHED_BYTES = 16 * 1024 * 1024


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
    message = f"{place}{found.problem.pointer}: {found.problem.reason}"
    if "cannot be held" in found.problem.reason and place.startswith(_WITH_STRICT):
        message += '; "strict": false beside the schema leaves out what cannot be held'
    raise invalid(message, param)


def _read(schema: Any, place: str, param: str, *, lenient: bool) -> CheckedSchema:
    try:
        text = json.dumps(schema, ensure_ascii=False, separators=(",", ":")).encode()
    except UnicodeEncodeError:  # JSON within a text of the body may have them
        message = f"{place}: has a lone surrogate (such as \\ud800), which is half of a letter"
        raise invalid(message, param) from None
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
