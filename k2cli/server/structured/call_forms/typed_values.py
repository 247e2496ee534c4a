"""Grammars of values that stand between tags: texts without quotes, and JSON.

A string is the text itself, and every other value is JSON text. If the tag says which it is, any
union can be written. If not, our parser takes the JSON value of a type that the schema allows, and
else the text; a union that this rule cannot keep apart is refused, or not held to.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from k2cli.grammars.text import ANY_TEXT, GrammarText, choice
from k2cli.server.output.parameter_types import STRING, Schema, value_of_text
from k2cli.server.structured.call_forms.parameters import Branches, NotHeld, constraints, standalone
from k2cli.server.structured.call_forms.parts import json_problem
from k2cli.server.structured.call_forms.text_patterns import text_patterns

_STRUCTURES = frozenset({"object", "array"})
_NO_STRUCTURE = rf"\s*([^\s{{\[]{ANY_TEXT})?"
_SPACES = r"[\s\x1c-\x1f]{0,8}"
_STRIPPED = rf"([^\s\x1c-\x1f]({ANY_TEXT}[^\s\x1c-\x1f])?)?"


@dataclass(frozen=True, slots=True)
class ValuePlace:
    """Place of a value between its tags.

    Attributes:
        end: the closing tag.
        before, after: what stands between the tags and the value.
        gap: pattern of whitespace that may stand after JSON.
        without: other letters that a text without quotes must not have in it.
        limited_without: the same for texts with a pattern or a length.
        strip: what the parser removes from a text.
        is_stripped: True if that is all whitespace at its ends.
        booleans: other words for truth values, where no other value is possible.
    """

    end: str
    before: str = ""
    after: str = ""
    gap: str = r"[ \n]{1,4}"
    without: tuple[str, ...] = ()
    limited_without: tuple[str, ...] = ()
    strip: Callable[[str], str] = str
    is_stripped: bool = False
    booleans: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ValueSchema:
    """Schema of one parameter.

    Attributes:
        schema: the parameter's own part.
        root: the whole one, in which ``$ref`` points.
        strict: False to hold values only to what can be expressed.
    """

    schema: Schema
    root: object
    strict: bool

    @property
    def types(self) -> frozenset[str]:
        """The types that it allows."""
        return self.types_of(self.schema)

    def types_of(self, part: Schema) -> frozenset[str]:
        """Return the types that a part of the whole schema allows."""
        return Branches(self.root).types(part)

    def branches(self) -> list[Schema]:
        """Return the schema's alternatives.

        Raises:
            NotHeld: if it is strict and has too many.
        """
        try:
            return Branches(self.root).of(self.schema)
        except NotHeld:
            if self.strict:
                raise
            return [{}]

    def parts(self) -> tuple[list[Schema], list[Schema]]:
        """Return the alternatives that are strings, and the others.

        Raises:
            NotHeld: if an alternative may be either and has constraints.
        """
        strings: list[Schema] = []
        others: list[Schema] = []
        for part in self.branches():
            types = self.types_of(part)
            if STRING not in types:
                others += [part] if types else []
            elif types == {STRING}:
                strings.append(part)
            elif self.strict and constraints(part):
                named = ", ".join(sorted(constraints(part)))
                raise NotHeld(f"strings and other values are not told apart under {named}")
            else:
                strings.append({"type": STRING})
                others += [{"type": kind} for kind in sorted(types - {STRING, "integer"})]
        return strings, others

    def json(self, text: GrammarText, parts: list[Schema]) -> str:
        """Return an expression for a JSON text of one of some alternatives.

        Raises:
            NotHeld: if a grammar cannot express them.
        """
        joined: Schema = parts[0] if len(parts) == 1 else {"anyOf": parts}
        schema = standalone(joined, self.root)
        why = json_problem(schema, strict=self.strict)
        if why is not None and self.strict:
            raise NotHeld(why)
        if why is not None:
            types = frozenset().union(*map(Branches(self.root).types, parts))
            schema = {"type": sorted(types)}
        return text.json(schema, lenient=not self.strict)


def text_value(text: GrammarText, value: ValueSchema, parts: list[Schema], at: ValuePlace) -> str:
    """Return an expression for strings of some alternatives, with the closing tag.

    Raises:
        NotHeld: if no grammar holds them.
    """
    before = f"{text.letters(at.before)} " if at.before else ""
    patterns = [text_patterns(part, strict=value.strict) for part in parts]
    if any(not each for each in patterns):
        return f"{before}{text.text_until(at.end, without=at.without)}"
    # A text that does not match yet could go on over the tag.
    without = (*text.spelled([at.end]), *at.without)
    tail = text.literal(f"{at.after}{at.end}")
    literals = [_literals(part) for part in parts]
    if all(each is not None for each in literals):
        kept = [
            each
            for each in dict.fromkeys(word for words in literals for word in words or ())
            if at.strip(f"{at.before}{each}{at.after}") == each
            and not any(part in each for part in (at.end, *at.without, *at.limited_without))
        ]
        if not kept:
            raise NotHeld("none of its values can be written between these tags")
        return f"{before}{choice(*map(text.letters, kept))} {tail}"
    if len(parts) > 1:
        if value.strict and any(len(each) > 1 for each in patterns):
            raise NotHeld("only one of several patterns and lengths of a text can be held to")
        one = "|".join(f"({each[0]})" for each in patterns)
        patterns = [[one]]
    without = (*without, *at.limited_without)
    every = [*patterns[0], *([_STRIPPED] if at.is_stripped else [])]
    around = _SPACES if at.is_stripped else ""
    end = f"{at.after}{at.end}"
    return f"{before}{text.text_until(end, *every, without=without, around=around)}"


def _literals(part: Schema) -> list[str] | None:
    if not isinstance(part, dict):
        return None
    if "const" in part:
        return [part["const"]]
    values = part.get("enum")
    return [each for each in values if isinstance(each, str)] if isinstance(values, list) else None


def json_value(text: GrammarText, value: ValueSchema, parts: list[Schema], at: ValuePlace) -> str:
    """Return an expression for JSON values of some alternatives, with the closing tag.

    Raises:
        NotHeld: if no grammar holds them.
    """
    before = f"{text.letters(at.before)} " if at.before else ""
    gap = f"{text.terminal(at.gap)}?" if at.gap else ""
    content = value.json(text, parts)
    if at.booleans and all(
        isinstance(part, dict) and part.get("type") == "boolean" and constraints(part) == {"type"}
        for part in parts
    ):
        content = choice(content, *map(text.letters, at.booleans))
    return f"{before}{content} {gap} {text.literal(at.end)}"


def untold_value(text: GrammarText, value: ValueSchema, at: ValuePlace) -> str:
    """Return an expression for a value whose tag does not tell its type, with the closing tag.

    Raises:
        NotHeld: if no grammar holds it.
    """
    types = value.types
    if STRING not in types:
        return json_value(text, value, [value.schema], at)
    strings, others = value.parts()
    if not others:
        return text_value(text, value, strings, at)
    if any(not text_patterns(part, strict=value.strict) for part in strings):
        return _text_or_json(text, value, others, at)
    kept = [
        word
        for part in strings
        for word in _literals(part) or ()
        if value_of_text(word, types) == [word]
    ]
    if any(_literals(part) is None for part in strings):
        if value.strict:
            raise NotHeld("texts of some form and other values are not told apart")
        return _text_or_json(text, value, others, at)
    ways = [json_value(text, value, others, at)]
    if kept:
        ways.append(text_value(text, value, [{"enum": kept}], at))
    return choice(*ways)


def _text_or_json(
    text: GrammarText, value: ValueSchema, others: list[Schema], at: ValuePlace
) -> str:
    """Return an expression for any text, or JSON of objects and arrays.

    Any other JSON value is one of the texts; it must not be limited, because it would be read as
    that value.
    """
    find = Branches(value.root).types
    for part in others:
        if value.strict and find(part) - _STRUCTURES and constraints(part) - {"type"}:
            raise NotHeld("strings and limited values of other types are not told apart")
    structures = [part for part in others if find(part) & _STRUCTURES]
    before = f"{text.letters(at.before)} " if at.before else ""
    if not structures:
        return f"{before}{text.text_until(at.end, without=at.without)}"
    without = (*text.spelled([at.end]), *at.without)
    plain = text.text_until(at.end, _NO_STRUCTURE, without=without)
    return choice(f"{before}{plain}", json_value(text, value, structures, at))
