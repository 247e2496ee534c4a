"""Rewriting of one schema's keywords: without those that say nothing, and in 2020-12's words."""

from __future__ import annotations

from typing import Any

from k2cli.server.structured.formats import CLOCK_PATTERNS
from k2cli.server.structured.keywords import ANNOTATIONS, COUNTS, IN_PLACE, REFUSED

MAX_COUNT = 2**31 - 1
"""No answer is longer, so that a larger maximum says nothing."""

Schema = dict[str, Any]


def rewritten(schema: Schema) -> Schema:
    """Return the keywords of a schema that decide what is valid, in the words of 2020-12."""
    given = {
        key: value
        for key, value in schema.items()
        if key not in ANNOTATIONS and not key.startswith("x-")
    }
    for key, nothing in _NOTHING.items():
        if key in given and any(_same(given[key], one) for one in nothing):
            del given[key]
    for key, needed in _NEEDED.items():
        if needed not in given:
            given.pop(key, None)
    _draft_4_limits(given)
    _items_of_older_drafts(given)
    _unevaluated(given)
    _listed_names(given)
    kinds = given.get("type")
    if isinstance(kinds, str | list) and "string" not in kinds:
        given.pop("format", None)
    for key in COUNTS:
        if isinstance(given.get(key), float) and given[key].is_integer():
            given[key] = int(given[key])
        if key.startswith("max") and type(given.get(key)) is int and given[key] > MAX_COUNT:
            del given[key]
    return given


def replace_format(given: Schema) -> None:
    """Write the format of a date or time as a pattern."""
    form = given.get("format")
    if not isinstance(form, str) or form not in CLOCK_PATTERNS:
        return
    pattern = f"^{CLOCK_PATTERNS[form]}$"
    if "pattern" not in given:
        given["pattern"] = pattern
    elif isinstance(given.setdefault("allOf", []), list):
        given["allOf"] = [*given["allOf"], {"pattern": pattern}]
    del given["format"]


def _same(value: Any, other: Any) -> bool:
    return type(value) is type(other) and bool(value == other)


_NOTHING: dict[str, tuple[Any, ...]] = {
    "uniqueItems": (False,),
    "minItems": (0,),
    "minLength": (0,),
    "minProperties": (0,),
    "required": ([],),
    "dependentRequired": ({},),
    "dependentSchemas": ({},),
    "dependencies": ({},),
    "propertyNames": (True, {}, {"type": "string"}),
    "unevaluatedProperties": (True, {}),
    "unevaluatedItems": (True, {}),
    "not": (False,),
    "nullable": (False,),
    "exclusiveMinimum": (False,),
    "exclusiveMaximum": (False,),
    "$recursiveAnchor": (False,),
}
"""Values with which a keyword says nothing."""

_NEEDED = {"then": "if", "else": "if", "minContains": "contains", "maxContains": "contains"}
"""Keywords that say nothing without another one."""


def _draft_4_limits(given: Schema) -> None:
    """Write draft 4's ``"exclusiveMinimum": true`` as later drafts do."""
    for flag, limit in (("exclusiveMinimum", "minimum"), ("exclusiveMaximum", "maximum")):
        if given.get(flag) is True and limit in given:
            given[flag] = given.pop(limit)


def _items_of_older_drafts(given: Schema) -> None:
    """Write an array ``items`` as ``prefixItems``, and ``additionalItems`` as ``items``."""
    rest = given.pop("additionalItems", None)
    if isinstance(given.get("items"), list):
        given["prefixItems"] = given.pop("items")
        if rest is not None:
            given["items"] = rest


def _unevaluated(given: Schema) -> None:
    """Write ``unevaluated...: false`` in other words where these mean the same."""
    if IN_PLACE & given.keys() or REFUSED.keys() & given.keys() - _UNEVALUATED.keys():
        return
    for key, same in _UNEVALUATED.items():
        if given.get(key) is False:
            del given[key]
            given.setdefault(same, False)


def _listed_names(given: Schema) -> None:
    """Write ``propertyNames`` in other words where these mean the same, as for Zod's records."""
    names = given.get("propertyNames")
    if not isinstance(names, dict) or {"properties", "patternProperties"} & given.keys():
        return
    rules = {key: value for key, value in names.items() if key != "type" or value != "string"}
    rest = given.get("additionalProperties", True)
    match rules:
        case {"enum": [*listed]} if len(rules) == 1 and all(isinstance(n, str) for n in listed):
            given["properties"] = dict.fromkeys(listed, rest)
        case {"pattern": str() as pattern} if len(rules) == 1:
            given["patternProperties"] = {pattern: rest}
        case _:
            return
    del given["propertyNames"]
    given["additionalProperties"] = False


_UNEVALUATED = {"unevaluatedProperties": "additionalProperties", "unevaluatedItems": "items"}
