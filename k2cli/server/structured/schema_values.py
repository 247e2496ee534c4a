"""Checks of keywords whose values have no schemas in them: types, bounds, contradictions."""

from __future__ import annotations

import functools
import json
import re
from typing import Any

from k2cli.server.json_pointer import pointer_part
from k2cli.server.structured.keywords import COUNTS, DRAFTS, NUMBERS, PLAIN
from k2cli.server.structured.patterns import CANNOT_BE_WRITTEN, CONTROL
from k2cli.server.structured.rewriting import MAX_COUNT, Schema
from k2cli.server.structured.schema_problem import SchemaProblem, shown

MAX_REQUIRED = 2_000
MAX_OPTIONAL = 800
"""Optional properties of one object: with 1,000 and K2's vocabulary, masks exceed their limit."""
MAX_ENUM_VALUES = 10_000
MAX_ENUM_STRUCTURES = 3_000
"""Arrays and objects in one enum, each of which is another way to go on."""
MAX_LITERAL_MEMBERS = 10_000
"""Of all arrays and objects in enums and consts, each of which becomes a rule."""
MAX_LITERAL_LETTERS = 50_000
"""Of one string in an enum: masks take time that is linear in it (200,000: 1 s)."""
MAX_EXACT_INTEGER = 2**53
"""llguidance computes with doubles."""
MAX_SHARED_FACTOR = 65_535
"""With several ``multipleOf``, their least common multiple must fit into 32 bits."""

_LEAST_LITERAL = 1e-9
_MAX_CACHED_LETTERS = 1_000


class ValueChecks:
    """Checks of all parts of one schema."""

    def __init__(self) -> None:
        self._members = 0
        self._multiples: list[tuple[str, float]] = []

    def check(self, given: Schema, pointer: str) -> None:
        """Check the values of one part.

        Raises:
            SchemaProblem: if they break the metaschema, exceed a bound, or contradict each other.
        """
        shape = {key: given[key] for key in PLAIN if key in given}
        if isinstance(shape.get("enum"), list):
            if len(shape["enum"]) > MAX_ENUM_VALUES:
                reason = f"has {len(shape['enum'])} values, and the most are {MAX_ENUM_VALUES}"
                raise SchemaProblem(f"{pointer}/enum", reason)
            if sum(isinstance(each, dict | list) for each in shape["enum"]) > MAX_ENUM_STRUCTURES:
                reason = f"has more than {MAX_ENUM_STRUCTURES} arrays and objects"
                raise SchemaProblem(f"{pointer}/enum", reason)
            if not shape["enum"]:
                raise SchemaProblem(f"{pointer}/enum", "has no values")
            shape["enum"] = [None]
        if "const" in shape:
            shape["const"] = None
        _check_shape(shape, pointer)
        if len(given.get("required", ())) > MAX_REQUIRED:
            raise SchemaProblem(f"{pointer}/required", f"has more than {MAX_REQUIRED} names")
        optional = len({*_names(given)} - {*given.get("required", ())})
        if optional > MAX_OPTIONAL:
            reason = (
                f"has {optional} members that are not required, and the most are {MAX_OPTIONAL}"
            )
            raise SchemaProblem(f"{pointer}/properties", reason)
        for name in (*given.get("required", ()), *_names(given)):
            if CONTROL.search(name):
                raise SchemaProblem(pointer, f"the name {name!r:.80} has {CANNOT_BE_WRITTEN}")
        for key in ("const", "enum"):
            if key in given:
                self._members += _check_literals(given[key], f"{pointer}/{key}", key == "enum")
                if self._members > MAX_LITERAL_MEMBERS:
                    reason = f"its values have more than {MAX_LITERAL_MEMBERS} members"
                    raise SchemaProblem(f"{pointer}/{key}", reason)
        for key in (*NUMBERS, *COUNTS):
            most = MAX_EXACT_INTEGER if key in NUMBERS else MAX_COUNT
            if not abs(given.get(key, 0)) <= most:  # nor NaN
                raise SchemaProblem(f"{pointer}/{key}", f"{shown(given[key])} is too large")
        _check_order(given, pointer)
        if "multipleOf" in given:
            self._multiples.append((f"{pointer}/multipleOf", given["multipleOf"]))

    def check_together(self) -> None:
        """Check that the numbers of several ``multipleOf`` may be combined.

        Raises:
            SchemaProblem: if one is too large.
        """
        if len(self._multiples) < 2:
            return
        texts = [format(value, "f").rstrip("0") for _, value in self._multiples]
        digits = max(len(text.partition(".")[2]) for text in texts)
        for pointer, value in self._multiples:
            if value * 10**digits > MAX_SHARED_FACTOR:
                reason = f"{shown(value)} is too large beside other 'multipleOf' of the schema"
                raise SchemaProblem(pointer, reason)


def _names(given: Schema) -> list[str]:
    members = given.get("properties")
    return list(members) if isinstance(members, dict) else []


def check_dialect(value: Any) -> None:
    """Check the value of ``$schema``. Many write http for https, or https for http.

    Raises:
        SchemaProblem: if it names another dialect than those that are understood.
    """
    if not isinstance(value, str) or _without_scheme(value.rstrip("#")) not in _KNOWN:
        reason = f"{shown(value)} is not known; known are {', '.join(DRAFTS)}"
        raise SchemaProblem("/$schema", reason)


def _without_scheme(address: str) -> str:
    return re.sub("^https?://", "", address)


_KNOWN = frozenset(map(_without_scheme, DRAFTS))


def _check_literals(value: Any, pointer: str, several: bool) -> int:
    """Check the strings and numbers of an enum or a const, without recursion.

    Returns:
        the number of members of arrays and objects in the values.
    """
    members = -len(value) if several else 0
    level = [(pointer, value)]
    while level:
        place, found = level.pop()
        if isinstance(found, dict | list):
            members += len(found)
        if isinstance(found, dict):
            level += ((place + pointer_part(name), each) for name, each in found.items())
        elif isinstance(found, list):
            level += ((f"{place}/{index}", each) for index, each in enumerate(found))
        elif isinstance(found, str) and len(found) > MAX_LITERAL_LETTERS:
            raise SchemaProblem(place, f"has more than {MAX_LITERAL_LETTERS} letters")
        elif isinstance(found, str) and CONTROL.search(found):
            raise SchemaProblem(place, f"has {CANNOT_BE_WRITTEN}")
        elif isinstance(found, int | float) and not isinstance(found, bool):
            small = isinstance(found, float) and 0 < abs(found) < _LEAST_LITERAL
            if small or not abs(found) <= MAX_EXACT_INTEGER:
                raise SchemaProblem(place, f"{shown(found)} is too large or too small")
    return members


def _check_order(given: Schema, pointer: str) -> None:
    """Refuse limits that no value can be within."""
    for least, most in _LIMITS:
        if least in given and most in given:
            low, high = given[least], given[most]
            if low > high or ("exclusive" in least + most and low == high):
                relation = "greater" if low > high else "not less"
                reason = f"{least} ({shown(low)}) is {relation} than {most} ({shown(high)})"
                raise SchemaProblem(pointer, reason)


_LIMITS = (
    ("minimum", "maximum"),
    ("exclusiveMinimum", "maximum"),
    ("minimum", "exclusiveMaximum"),
    ("exclusiveMinimum", "exclusiveMaximum"),
    ("minLength", "maxLength"),
    ("minItems", "maxItems"),
    ("minProperties", "maxProperties"),
)


def _check_shape(shape: Schema, pointer: str) -> None:
    text = json.dumps(shape, sort_keys=True)
    # The cache counts its entries, and a client may send many that are long.
    find = _shape_problem if len(text) <= _MAX_CACHED_LETTERS else _shape_problem.__wrapped__
    found = find(text)
    if found is not None:
        raise SchemaProblem(pointer + found[0], found[1])


@functools.lru_cache(maxsize=4096)
def _shape_problem(shape: str) -> tuple[str, str] | None:
    """Return the place and the reason why keywords without schemas break their metaschema."""
    from jsonschema.exceptions import best_match

    error = best_match(_shape_validator().iter_errors(json.loads(shape)))
    if error is None:
        return None
    path = list(error.absolute_path)
    place = "".join(map(pointer_part, map(str, path)))
    if path[:1] == ["type"]:
        types = "array, boolean, integer, null, number, object and string"
        return place, f"{shown(error.instance)} is not a type of JSON Schema; there are {types}"
    return place, shown(error.message)


@functools.cache
def _shape_validator() -> Any:
    """Return the validator of 2020-12's metaschema of keywords without schemas.

    The whole metaschema takes ten times as long, and checks subschemas, which the reader visits.
    """
    from jsonschema import Draft202012Validator

    return Draft202012Validator({"$ref": DRAFTS[0].replace("/schema", "/meta/validation")})
