"""Grammars of calls in Gemma's notation: JSON with bare keys, and tokens as quotation marks."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from k2cli.grammars.text import GrammarText, choice
from k2cli.server.output.parameter_types import STRING, Schema
from k2cli.server.structured.call_forms.parameters import Branches, NotHeld, constraints
from k2cli.server.structured.call_forms.parts import (
    Calls,
    Function,
    Opening,
    check_tokens,
    joined,
    refuse,
    separated,
)
from k2cli.server.structured.call_forms.typed_calls import argument_lists
from k2cli.server.structured.call_forms.typed_values import ValuePlace, ValueSchema, text_value

_GEMMA4 = ("<|tool_call>", "<tool_call|>", '<|"|>')
_FUNCTION_GEMMA = ("<start_function_call>", "<end_function_call>", "<escape>")
_GEMMA4_NAME = re.compile(r"[\w-]+")
_WORD = re.compile(r"\w+")
_ARRAY = {"type", "items", "minItems", "maxItems"}
_OBJECT = {"type", "properties", "required", "additionalProperties"}
_MAX_ITEMS = 1000
_NO_WORD = "its name has other letters than those of words"
_SCALARS = ("boolean", "integer", "null", "number")


def gemma4(functions: Sequence[Function], text: GrammarText, *, several: bool) -> Calls:
    """Gemma 4: ``call:NAME{key:<|"|>text<|"|>,other:[1,{a:true}]}``."""
    check_tokens("gemma4", _GEMMA4, functions, text)
    writers: dict[int, _Notation] = {}

    def write(key: str, value: ValueSchema) -> str:
        # A root lives as long as its writer.
        writer = writers.setdefault(id(value.root), _Notation(text, value.root, value.strict))
        return f"{writer.key(key)} {writer.value(value.schema)}"

    each = []
    for function in functions:
        if not _GEMMA4_NAME.fullmatch(function.name):
            raise refuse("gemma4", function, _NO_WORD)
        each.append(
            _call("gemma4", function, text, argument_lists("gemma4", function, write, in_order))
        )
    return _sections(_GEMMA4, each, text, several=several)


def function_gemma(functions: Sequence[Function], text: GrammarText, *, several: bool) -> Calls:
    """FunctionGemma: strings between ``<escape>``, numbers and words; nothing that nests.

    The arguments end at the first brace, even within a string.
    """
    check_tokens("function_gemma", _FUNCTION_GEMMA, functions, text)
    quote = text.literal(_FUNCTION_GEMMA[2])
    place = ValuePlace(_FUNCTION_GEMMA[2], without=("}", _FUNCTION_GEMMA[2]))

    def write(key: str, value: ValueSchema) -> str:
        if not _WORD.fullmatch(key):
            raise NotHeld(_NO_WORD)
        strings, others = value.parts()
        ways = []
        if strings:
            ways.append(f"{quote} {text_value(text, value, strings, place)}")
        scalars = [part for part in others if value.types_of(part) <= set(_SCALARS)]
        if len(scalars) < len(others) and (value.strict or not scalars):
            raise NotHeld("this model writes no objects and arrays")
        if scalars:
            ways.append(value.json(text, scalars))
        return f"{text.letters(f'{key}:')} {choice(*ways)}"

    each = []
    for function in functions:
        if not _WORD.fullmatch(function.name):
            raise refuse("function_gemma", function, _NO_WORD)
        lists = argument_lists("function_gemma", function, write, in_order)
        each.append(_call("function_gemma", function, text, lists))
    return _sections(_FUNCTION_GEMMA, each, text, several=several)


def _call(
    form: str, function: Function, text: GrammarText, lists: Sequence[Sequence[tuple[str, bool]]]
) -> str:
    arguments = choice(*(separated(text, items, text.letters(",")) for items in lists))
    return f"{text.letters(f'call:{function.name}{{')} {arguments} {text.letters('}')}"


def _sections(
    markers: Sequence[str], calls: Sequence[str], text: GrammarText, *, several: bool
) -> Calls:
    opens, end = text.literal(markers[0]), text.literal(markers[1])
    call = text.rule(f"{choice(*calls)} {end}")
    return Calls((Opening(markers[0], joined(call, opens, several=several)),))


def in_order(names: Iterable[str]) -> list[str]:
    """Return names in the order in which the chat templates write them."""
    return sorted(names, key=str.lower)


@dataclass(slots=True)
class _Notation:
    """Writer of values by their schema."""

    text: GrammarText
    root: object
    strict: bool
    _rules: dict[str, str] = field(default_factory=dict)
    _any: str = ""

    def key(self, name: str) -> str:
        """Return an expression for a key and the colon after it."""
        if _WORD.fullmatch(name):
            return self.text.letters(f"{name}:")
        return f"{self._quoted(name)} {self.text.letters(':')}"

    def _quoted(self, content: str) -> str:
        quote = _GEMMA4[2]
        if quote in content:
            raise NotHeld(f"{quote} is this model's quotation mark")
        marks = self.text.literal(quote)
        return f"{marks} {self.text.letters(content)} {marks}"

    def value(self, schema: Schema) -> str:
        """Return an expression for a value.

        Raises:
            NotHeld: if a grammar cannot express it.
        """
        known = json.dumps(schema, sort_keys=True)
        if known not in self._rules:

            def body(name: str) -> str:
                self._rules[known] = name
                branches = Branches(self.root).of(schema)
                if not branches:
                    raise NotHeld("no value is allowed")
                return choice(*map(self._branch, branches))

            self.text.recursive_rule(body)
        return self._rules[known]

    def _branch(self, part: Schema) -> str:
        if not isinstance(part, dict) or not constraints(part):
            return self._any_value()
        if "$ref" in part:
            raise NotHeld("a reference to itself without anything between")
        if "const" in part or "enum" in part:
            return self._listed(part)
        types = Branches(self.root).types(part)
        if types == {STRING}:
            place = ValuePlace(_GEMMA4[2], without=_GEMMA4[2:])
            value = ValueSchema(part, self.root, self.strict)
            return f"{self.text.literal(_GEMMA4[2])} {text_value(self.text, value, [part], place)}"
        if types <= set(_SCALARS):
            return ValueSchema(part, self.root, self.strict).json(self.text, [part])
        if types == {"array"}:
            return self._array(part)
        if types == {"object"}:
            return self._object(part)
        if self.strict:
            raise NotHeld(f"{', '.join(sorted(constraints(part)))} of several types together")
        return self._any_value()

    def _listed(self, part: dict[str, Any]) -> str:
        if self.strict and constraints(part) - {"type", "enum", "const"}:
            raise NotHeld("a list of values with other constraints")
        values = [part["const"]] if "const" in part else part["enum"]
        if not values:
            raise NotHeld("an empty list of values")
        return choice(*map(self._literal, values))

    def _literal(self, value: object) -> str:
        if isinstance(value, str):
            return self._quoted(value)
        if isinstance(value, list):
            inner = f" {self.text.letters(',')} ".join(map(self._literal, value))
            return f"{self.text.letters('[')} {inner} {self.text.letters(']')}"
        if isinstance(value, Mapping):
            members = (f"{self.key(key)} {self._literal(item)}" for key, item in value.items())
            inner = f" {self.text.letters(',')} ".join(members)
            return f"{self.text.letters('{')} {inner} {self.text.letters('}')}"
        return self.text.letters(json.dumps(value))

    def _array(self, part: dict[str, Any]) -> str:
        if self.strict and (unknown := constraints(part) - _ARRAY):
            raise NotHeld(f"{', '.join(sorted(unknown))} of an array")
        item, comma = self.value(part.get("items", {})), self.text.letters(",")
        least, most = int(part.get("minItems", 0)), part.get("maxItems")
        if max(least, most or 0) > _MAX_ITEMS:
            raise NotHeld(f"an array of more than {_MAX_ITEMS} items")
        begin, end = self.text.letters("["), self.text.letters("]")
        if most is not None and int(most) == 0:
            return f"{begin} {end}"
        more = f"{{{max(least - 1, 0)},{'' if most is None else int(most) - 1}}}"
        items = f"{item} ({comma} {item}){more}"
        return f"{begin} {items if least else f'({items})?'} {end}"

    def _object(self, part: dict[str, Any]) -> str:
        if self.strict and (unknown := constraints(part) - _OBJECT):
            raise NotHeld(f"{', '.join(sorted(unknown))} of an object")
        properties = part.get("properties") or {}
        required = part.get("required", [])
        begin, end = self.text.letters("{"), self.text.letters("}")
        if not properties and not required and part.get("additionalProperties") is not False:
            more = part.get("additionalProperties", True)
            return f"{begin} {self._members(self.value(more))} {end}"
        members = {**properties, **{name: True for name in required if name not in properties}}
        items = [
            (self.text.rule(f"{self.key(name)} {self.value(members[name])}"), name in required)
            for name in in_order(members)
        ]
        return f"{begin} {separated(self.text, items, self.text.letters(','))} {end}"

    def _members(self, value: str) -> str:
        member = f"{self.text.terminal(r'[a-zA-Z_][a-zA-Z0-9_]{0,63}:')} {value}"
        return f"({member} ({self.text.letters(',')} {member})*)?"

    def _any_value(self) -> str:
        """Return an expression for any value."""
        if not self._any:

            def body(name: str) -> str:
                self._any = name
                text = self.text
                comma = text.letters(",")
                array = f"{text.letters('[')} ({name} ({comma} {name})*)? {text.letters(']')}"
                members = f"{text.letters('{')} {self._members(name)} {text.letters('}')}"
                string = (
                    f"{text.literal(_GEMMA4[2])} {text.text_until(_GEMMA4[2], without=_GEMMA4[2:])}"
                )
                return choice(string, text.json({"type": list(_SCALARS)}), array, members)

            self.text.recursive_rule(body)
        return self._any
