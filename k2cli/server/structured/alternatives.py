"""Rewriting of ``oneOf`` to ``anyOf`` where no value can match two of its schemas.

A grammar can say "one of these", but not "exactly one". Pydantic and others write ``oneOf`` for
unions with a tag, where the two are the same.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from itertools import combinations
from typing import Any

from k2cli.server.output.parameter_types import TYPES, type_of
from k2cli.server.structured.normal_form import NormalSchema
from k2cli.server.structured.rewriting import Schema
from k2cli.server.structured.schema_problem import SchemaProblem

MAX_COMPARISONS = 50_000
"""Comparisons for one schema; with more, schemas count as overlapping."""
_MAX_LEVELS = 16
_TYPES = TYPES - {"integer"}
_OVERLAP = (
    "two of its schemas may match the same value, and 'exactly one' cannot be held; use anyOf"
)


def replace_one_of(found: NormalSchema, *, lenient: bool) -> None:
    """Replace ``oneOf`` in all parts of a schema.

    Args:
        found: the schema, which is changed.
        lenient: True to replace it even if two of its schemas overlap.

    Raises:
        SchemaProblem: if two may overlap.
    """
    compared = _Comparison(found)
    for part in found.one_ofs:
        options = part.pop("oneOf")
        disjoint = compared.all_disjoint(options)
        if not disjoint and not lenient:
            raise SchemaProblem(found.places[id(part)] + "/oneOf", _OVERLAP)
        if "anyOf" in part:
            options = [{"anyOf": part.pop("anyOf")}, {"anyOf": options}]
            part["allOf"] = [*part.get("allOf", ()), *options]
        else:
            part["anyOf"] = options


class _Comparison:
    """Proof that no value matches two schemas."""

    def __init__(self, found: NormalSchema) -> None:
        self._found = found
        self._left = MAX_COMPARISONS

    def all_disjoint(self, options: list[Schema | bool]) -> bool:
        """Return True if no value matches two of the schemas; False if that is not certain."""
        targets = [self._target(option) for option in options]
        if _differ(targets):
            return True
        needed = [set(target.get("required", ())) for target in targets]
        objects = all(_types(target) == {"object"} for target in targets)
        for name in sorted(set.intersection(*needed)) if objects else ():
            if _differ([self._target(_member(target, name)) for target in targets]):
                return True
        return all(self.disjoint(one, other, 0) for one, other in combinations(options, 2))

    def _target(self, option: Schema | bool) -> Schema:
        """Return what a reference refers to, and another schema as it is."""
        if isinstance(option, dict) and list(option) == ["$ref"]:
            option = self._found.target(option["$ref"])
        return option if isinstance(option, dict) else {}

    def disjoint(self, one: Schema | bool, other: Schema | bool, level: int) -> bool:
        """Return True if no value matches both schemas; False if that is not certain."""
        self._left -= 1
        if self._left < 0 or level > _MAX_LEVELS:
            return False
        if one is False or other is False:
            return True
        if one is True or other is True:
            return False
        if not _types(one) & _types(other) or _other_values(one, other):
            return True
        if _is_below(one, other) or _is_below(other, one):
            return True
        return (
            self._parts_disjoint(one, other, level)
            or self._parts_disjoint(other, one, level)
            or self._members_disjoint(one, other, level)
        )

    def _parts_disjoint(self, one: Schema, other: Schema, level: int) -> bool:
        """Compare the schemas that ``one`` applies to the same value."""
        if "$ref" in one and self.disjoint(self._found.target(one["$ref"]), other, level + 1):
            return True
        if any(self.disjoint(part, other, level + 1) for part in one.get("allOf", ())):
            return True
        return any(
            all(self.disjoint(part, other, level + 1) for part in one[key])
            for key in ("anyOf", "oneOf")
            if key in one
        )

    def _members_disjoint(self, one: Schema, other: Schema, level: int) -> bool:
        """Compare the members that an object which matches both would need."""
        if _types(one) & _types(other) != {"object"}:
            return False
        needed = {*one.get("required", ()), *other.get("required", ())}
        return any(
            self.disjoint(_member(one, name), _member(other, name), level + 1) for name in needed
        )


def _types(schema: Schema) -> frozenset[str]:
    """Return the types that the values of a schema may have; integers are numbers."""
    given = schema.get("type", _TYPES)
    found = _with_numbers([given] if isinstance(given, str) else given)
    values = _listed(schema)
    return found if values is None else found & _with_numbers(map(type_of, values))


def _with_numbers(kinds: Iterable[str]) -> frozenset[str]:
    return frozenset("number" if kind == "integer" else kind for kind in kinds)


def _listed(schema: Schema) -> list[Any] | None:
    """Return a schema's only values, if it lists them."""
    return [schema["const"]] if "const" in schema else schema.get("enum")


def _values(schema: Schema) -> set[str] | None:
    """Return the JSON texts of a schema's only values, if it lists them."""
    given = _listed(schema)
    if given is None:
        return None
    whole = (int(one) if isinstance(one, float) and one.is_integer() else one for one in given)
    return {json.dumps(one, sort_keys=True) for one in whole}


def _differ(schemas: list[Schema]) -> bool:
    """Return True if each schema lists its values, and none is in two lists."""
    listed = [_values(schema) for schema in schemas]
    known = [values for values in listed if values is not None]
    return len(known) == len(listed) and len(set().union(*known)) == sum(map(len, known))


def _other_values(one: Schema, other: Schema) -> bool:
    values, others = _values(one), _values(other)
    return values is not None and others is not None and not values & others


def _is_below(one: Schema, other: Schema) -> bool:
    """Return True if all numbers of one schema are less than those of the other."""
    if _types(one) & _types(other) != {"number"}:
        return False
    high = min((one[key] for key in ("maximum", "exclusiveMaximum") if key in one), default=None)
    low = max((other[key] for key in ("minimum", "exclusiveMinimum") if key in other), default=None)
    return high is not None and low is not None and high < low


def _member(schema: Schema, name: str) -> Schema | bool:
    """Return the schema of a member."""
    found: Schema | bool | None = schema.get("properties", {}).get(name)
    if found is None and not schema.get("patternProperties"):
        found = schema.get("additionalProperties")
    return True if found is None else found
