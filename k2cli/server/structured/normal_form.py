"""The normal form of a JSON schema: what llguidance gets instead of the client's text.

A client's schema may be of any draft and have annotations, references and keywords without effect.
The normal form is of 2020-12, has nothing that says nothing, and has every schema that is referred
to under ``$defs`` of its root. What cannot be held is refused here, with its place.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from k2cli.server.json_pointer import pointer_of_fragment, pointer_part, value_at
from k2cli.server.structured.keywords import (
    DRAFTS,
    FORMATS,
    KNOWN,
    LISTS,
    NAMED,
    ORDER,
    REFUSED,
    SINGLE,
)
from k2cli.server.structured.patterns import held_pattern
from k2cli.server.structured.rewriting import Schema, replace_format, rewritten
from k2cli.server.structured.schema_problem import SchemaProblem, shown
from k2cli.server.structured.schema_values import ValueChecks, check_dialect

MAX_NESTING = 100
"""Arrays and objects within each other; JSON parsers of llguidance stop at 128."""
MAX_VALUES = 200_000
MAX_SUBSCHEMAS = 5_000
MAX_PROPERTIES = 2_000
"""Of one object: compiling takes time that is quadratic in them (2,000: 0.7 s)."""
MAX_ALTERNATIVES = 2_000
MAX_PATTERNS = 64
"""Patterns of names in one object: each pair is compared (200: 2 s)."""


_DEFINITIONS = "#/$defs/"


@dataclass(slots=True)
class NormalSchema:
    """A schema in its normal form.

    Attributes:
        root: the schema without its definitions.
        definitions: the schemas that are referred to, by the names of ``$defs``.
        places: the pointer of each of its parts in the client's schema, by the part's ``id``.
        patterns: the client's patterns, by those that are held in their place.
        references: for the root (``""``) and each definition, the definitions that it refers to in
            the order of the text, with the number of subschemas around each and whether other
            keywords stand beside the reference.
    """

    root: Schema | bool = True
    definitions: dict[str, Schema | bool] = field(default_factory=dict)
    places: dict[int, str] = field(default_factory=dict)
    patterns: dict[str, str] = field(default_factory=dict)
    references: dict[str, list[tuple[str, int, bool]]] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    one_ofs: list[Schema] = field(default_factory=list)

    def target(self, reference: str) -> Schema | bool:
        """Return the definition that a ``$ref`` of a part names."""
        return self.definitions[definition_name(reference)]

    def schema_of(self, part: Schema | bool) -> Schema:
        """Return a part as a schema of its own."""
        if part is False:
            return {"not": {}}
        alone = {} if part is True else dict(part)
        return alone | {"$defs": self.definitions} if self.definitions else alone


def definition_name(reference: str) -> str:
    """Return the name of the definition to which a ``$ref`` of the normal form refers."""
    return reference.removeprefix(_DEFINITIONS)


def normal_form(schema: Any, *, lenient: bool = False) -> NormalSchema:
    """Bring a schema to its normal form.

    Args:
        schema: as the client sent it.
        lenient: True to leave out what cannot be held.

    Raises:
        SchemaProblem: if the schema is not valid, exceeds a bound, or cannot be held.
    """
    _check_bounds(schema)
    return _Reader(schema, lenient).read()


def children(part: Schema) -> Iterator[tuple[str, Schema | bool]]:
    """Yield the subschemas of a normal schema with their pointers relative to it."""
    for key in ORDER:
        value = part.get(key)
        if value is None:
            continue
        if key in NAMED:
            for name, child in value.items():
                yield f"/{key}{pointer_part(name)}", child
        elif key in LISTS:
            for index, child in enumerate(value):
                yield f"/{key}/{index}", child
        elif key in SINGLE:
            yield f"/{key}", value


def _check_bounds(schema: Any) -> None:
    """Check nesting and the number of values, without recursion."""
    count = 0
    level = [schema]
    for _ in range(MAX_NESTING):
        inner: list[Any] = []
        for value in level:
            if isinstance(value, dict):
                inner += value.values()
            elif isinstance(value, list):
                inner += value
        count += len(inner)
        if count > MAX_VALUES:
            raise SchemaProblem("", f"has more than {MAX_VALUES} values")
        if not inner:
            return
        level = inner
    raise SchemaProblem("", f"nests more than {MAX_NESTING} arrays and objects")


class _Reader:
    """Reader of one schema."""

    def __init__(self, schema: Any, lenient: bool) -> None:
        self._whole = schema
        self._lenient = lenient
        self._found = NormalSchema()
        self._names: dict[str, str] = {}
        self._waiting: list[tuple[str, str, Any]] = []
        self._count = 0
        self._within = ""
        self._base = ""
        self._values = ValueChecks()
        self._refers = _refers(schema)
        self._anchors: dict[str, str] | None = None

    def read(self) -> NormalSchema:
        if isinstance(self._whole, dict):
            check_dialect(self._whole.get("$schema", DRAFTS[0]))
            base = self._whole.get("$id", self._whole.get("id"))
            self._base = base.rstrip("#") if isinstance(base, str) else ""
        if self._whole is False:
            raise SchemaProblem("", "allows no value")
        self._found.root = self._part_named("", "", self._whole)
        while self._waiting:
            name, pointer, schema = self._waiting.pop(0)
            self._found.definitions[name] = self._part_named(name, pointer, schema)
        self._values.check_together()
        return self._found

    def _part_named(self, name: str, pointer: str, schema: Any) -> Schema | bool:
        self._within = name
        self._found.references[name] = []
        before = self._count
        part = self._normal(schema, pointer, 0)
        self._found.sizes[name] = self._count - before + 1
        return part

    # --- one schema ---

    def _normal(self, schema: Any, pointer: str, depth: int) -> Schema | bool:
        if isinstance(schema, bool):
            return schema
        if not isinstance(schema, dict):
            raise SchemaProblem(pointer, f"{shown(schema)} is not a schema")
        self._count += 1
        if self._count > MAX_SUBSCHEMAS:
            raise SchemaProblem("", f"has more than {MAX_SUBSCHEMAS} subschemas")
        self._check_base(schema, pointer)
        given = rewritten(schema)
        self._leave_out_what_cannot_be_held(given, pointer)
        self._values.check(given, pointer)
        self._check_least_properties(given, pointer)
        made: Schema = {}
        for key in ORDER:
            if key not in given:
                continue
            value, place = given[key], f"{pointer}{pointer_part(self._client_key(key, schema))}"
            if key in NAMED:
                made[key] = self._named(key, value, place, depth)
            elif key in LISTS:
                made[key] = self._list(key, value, place, depth)
            elif key in SINGLE:
                made[key] = self._normal(value, place, depth + 1)
            elif key == "$ref":
                made[key] = self._reference(value, place, depth, beside=bool(made))
            else:
                made[key] = value
        self._found.places[id(made)] = pointer
        if "oneOf" in made:
            self._found.one_ofs.append(made)
        return made

    @staticmethod
    def _client_key(key: str, schema: Schema) -> str:
        """Return the client's word for a keyword of the normal form."""
        if key == "prefixItems" and "prefixItems" not in schema:
            return "items"
        if key == "items" and isinstance(schema.get("items"), list):
            return "additionalItems"
        return key

    def _named(self, key: str, value: Any, place: str, depth: int) -> Schema:
        if not isinstance(value, dict):
            raise SchemaProblem(place, "must be an object of schemas")
        most = MAX_PATTERNS if key == "patternProperties" else MAX_PROPERTIES
        if len(value) > most:
            raise SchemaProblem(place, f"has {len(value)} members, and the most are {most}")
        made: Schema = {}
        for name, each in value.items():
            part = place + pointer_part(name)
            made[self._name(key, name, part, made)] = self._normal(each, part, depth + 1)
        return made

    def _held(self, pattern: str) -> str:
        held = held_pattern(pattern)
        self._found.patterns.setdefault(held, pattern)
        return held

    def _name(self, key: str, name: str, place: str, made: Schema) -> str:
        """Return the name of a member in the normal form."""
        if key != "patternProperties":
            return name
        try:
            pattern = self._held(name)
        except ValueError as error:
            raise SchemaProblem(place, str(error)) from error
        while pattern in made:
            pattern += "(?:)"  # two patterns of a client may be the same in other words
        return pattern

    def _list(self, key: str, value: Any, place: str, depth: int) -> list[Schema | bool]:
        if not isinstance(value, list) or not (value or key == "prefixItems"):
            raise SchemaProblem(place, "must be an array of schemas")
        if len(value) > MAX_ALTERNATIVES and key != "prefixItems":
            reason = f"has {len(value)} members, and the most are {MAX_ALTERNATIVES}"
            raise SchemaProblem(place, reason)
        return [
            self._normal(each, f"{place}/{index}", depth + 1) for index, each in enumerate(value)
        ]

    # --- keywords ---

    def _leave_out_what_cannot_be_held(self, given: Schema, pointer: str) -> None:
        for key in [key for key in given if key not in KNOWN or key in REFUSED]:
            self._leave_out(key, given, pointer)
        form = given.get("format", "date")
        if not (isinstance(form, str) and form in FORMATS):
            known = ", ".join(sorted(FORMATS))
            reason = f"{shown(form)} cannot be held; the formats are {known}"
            self._leave_out("format", given, pointer, reason)
        pattern = given.get("pattern")
        if isinstance(pattern, str):
            try:
                given["pattern"] = self._held(pattern)
            except ValueError as error:
                self._leave_out("pattern", given, pointer, str(error))
        replace_format(given)

    def _check_least_properties(self, given: Schema, pointer: str) -> None:
        """Leave out a number of properties that the required ones reach anyway.

        Names of properties that are not declared may repeat in a grammar, so that counting them
        would hold nothing.
        """
        least = given.get("minProperties", 0)
        if least < 2:
            return
        if len(set(given.get("required", ()))) >= least:
            del given["minProperties"]
            return
        reason = f"{least}: more than 1 cannot be held beside properties that are optional"
        self._leave_out("minProperties", given, pointer, reason)

    def _leave_out(self, key: str, given: Schema, pointer: str, reason: str = "") -> None:
        """Leave a keyword out if that is allowed.

        Raises:
            SchemaProblem: if it is not.
        """
        if not self._lenient:
            if not reason and key in REFUSED:
                reason = f"'{key}' {REFUSED[key]}"
            if not reason:
                meant = difflib.get_close_matches(key[:64], KNOWN, 1)
                reason = f"'{shown(key)}' is not a keyword of JSON Schema"
                reason += f"; did you mean '{meant[0]}'?" if meant else ""
            raise SchemaProblem(pointer + pointer_part(key), reason)
        del given[key]

    def _check_base(self, schema: Schema, pointer: str) -> None:
        """Refuse a nested identifier, under which references would mean something else."""
        for key in ("$id", "id") if pointer and self._refers else ():
            value = schema.get(key)
            if isinstance(value, str) and not value.startswith("#"):
                reason = "a schema with a name of its own must be sent on its own"
                raise SchemaProblem(f"{pointer}/{key}", reason)

    # --- references ---

    def _reference(self, value: Any, place: str, depth: int, *, beside: bool) -> str:
        if not isinstance(value, str):
            raise SchemaProblem(place, f"{shown(value)} must be a text")
        path = value
        if self._base and path.startswith(self._base):
            path = path[len(self._base) :] or "#"
        if not path.startswith("#"):
            reason = f"{shown(value)} is another document; nothing is fetched for a schema"
            raise SchemaProblem(place, reason)
        pointer = pointer_of_fragment(path).rstrip("/")
        if pointer and not pointer.startswith("/"):
            pointer = self._anchor(pointer, value, place)
        name = self._names.get(pointer)
        if name is None:
            name = self._names[pointer] = f"d{len(self._names)}"
            try:
                target = value_at(self._whole, pointer)
            except LookupError:
                raise _points_to_nothing(value, place) from None
            self._waiting.append((name, pointer, target))
        self._found.references[self._within].append((name, depth, beside))
        return f"{_DEFINITIONS}{name}"

    def _anchor(self, name: str, value: str, place: str) -> str:
        """Return the pointer of the schema that has a name of its own."""
        if self._anchors is None:
            self._anchors = _anchors(self._whole)
        if name not in self._anchors:
            raise _points_to_nothing(value, place)
        return self._anchors[name]


def _points_to_nothing(reference: str, place: str) -> SchemaProblem:
    return SchemaProblem(place, f"{shown(reference)} points to nothing")


def _refers(schema: Any) -> bool:
    """Return True if there may be a reference within a schema."""
    level = [schema]
    while level:
        found = level.pop()
        if isinstance(found, dict):
            if "$ref" in found:
                return True
            level += found.values()
        elif isinstance(found, list):
            level += found
    return False


def _anchors(schema: Any) -> dict[str, str]:
    """Return the pointers of all schemas that have names of their own."""
    found: dict[str, str] = {}
    level: list[tuple[str, Any]] = [("", schema)]
    while level:
        pointer, part = level.pop()
        if isinstance(part, dict):
            for name in (part.get("$anchor"), part.get("$id"), part.get("id")):
                if isinstance(name, str):
                    found.setdefault(name.removeprefix("#"), pointer)
            level += ((pointer + pointer_part(key), each) for key, each in part.items())
        elif isinstance(part, list):
            level += ((f"{pointer}/{index}", each) for index, each in enumerate(part))
    return found
