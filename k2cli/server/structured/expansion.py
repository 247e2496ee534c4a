"""Checks of what the references of a schema lead to: nesting, copies, and values without an end.

It compiles a definition where it first finds a reference to it, by recursion in native code, which
ends the process if the stack is full. A reference with other keywords beside it becomes a copy of
its target, with all copies within. A member that is required and leads back to itself has no value
that ends, and a model would write until its limit.
"""

from __future__ import annotations

from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter

from k2cli.server.structured.normal_form import NormalSchema, definition_name
from k2cli.server.structured.rewriting import Schema
from k2cli.server.structured.schema_problem import SchemaProblem

MAX_LEVELS = 400
"""Subschemas within each other, through references. 1,800 fill a stack of 8 MiB."""
MAX_COPIED = 50_000
"""Subschemas after copying."""
_MAX_PASSES = 50


def check_expansion(found: NormalSchema) -> None:
    """Check what the references of a schema expand to.

    Raises:
        SchemaProblem: if it is too large, or endless.
    """
    _check_levels(found)
    _check_copies(found)
    _check_ends(found)


def _check_levels(found: NormalSchema) -> None:
    """Visit the definitions in the order in which llguidance does, and check the levels."""
    seen: set[str] = set()
    stack: list[tuple[int, Iterator[tuple[str, int, bool]]]] = [(0, iter(found.references[""]))]
    while stack:
        above, references = stack[-1]
        for name, depth, _ in references:
            if name in seen:
                continue
            seen.add(name)
            level = above + depth + 1
            if level > MAX_LEVELS:
                reason = f"its references nest more than {MAX_LEVELS} schemas within each other"
                raise SchemaProblem("", reason)
            stack.append((level, iter(found.references[name])))
            break
        else:
            stack.pop()


def _check_copies(found: NormalSchema) -> None:
    copied = {
        name: [target for target, _, beside in references if beside]
        for name, references in found.references.items()
    }
    try:
        order = list(TopologicalSorter(copied).static_order())
    except CycleError:
        reason = "a reference with other keywords beside it leads back to itself"
        raise SchemaProblem("", reason) from None
    sizes: dict[str, int] = {}
    for name in order:
        sizes[name] = found.sizes[name] + sum(sizes[target] for target in copied[name])
        if sizes[name] > MAX_COPIED:
            reason = "references with other keywords beside them make too many copies"
            raise SchemaProblem("", reason)


def _check_ends(found: NormalSchema) -> None:
    """Find the definitions that have values with an end, until no more are found."""
    ending: set[str] = set()
    names = list(reversed(found.definitions))
    for _ in range(_MAX_PASSES):
        more = {
            name for name in names if name not in ending and _ends(found.definitions[name], ending)
        }
        ending |= more
        if not more or len(ending) == len(names):
            break
    else:
        return
    if not _ends(found.root, ending):
        raise SchemaProblem("", "no value that ends matches: what it needs leads back to itself")


def _ends(schema: Schema | bool, ending: set[str]) -> bool:
    """Return True if a schema has values that need no definition outside of ``ending``."""
    if isinstance(schema, bool):
        return True
    if "const" in schema or "enum" in schema:
        return True
    if "$ref" in schema and definition_name(schema["$ref"]) not in ending:
        return False
    if not all(_ends(part, ending) for part in schema.get("allOf", ())):
        return False
    if "anyOf" in schema and not any(_ends(part, ending) for part in schema["anyOf"]):
        return False
    kinds = schema.get("type", ())
    if kinds in ("object", ["object"]):
        members = schema.get("properties", {})
        return all(_ends(members.get(name, True), ending) for name in schema.get("required", ()))
    if kinds in ("array", ["array"]) and schema.get("minItems", 0) > 0:
        first = schema.get("prefixItems", ())[: schema["minItems"]]
        rest = schema.get("items", True) if len(first) < schema["minItems"] else True
        return all(_ends(part, ending) for part in (*first, rest))
    return True
