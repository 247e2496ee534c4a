"""Grammars of calls in Python's syntax: ``[name(key="text", other=3)]``.

Values are JSON texts, which our parser reads as Python or, for ``true``, ``false`` and ``null``, as
JSON; that is how the chat templates write them, but for ``True``, ``False`` and ``None`` by
themselves.
"""

from __future__ import annotations

import keyword
import unicodedata
from collections.abc import Sequence

from k2cli.grammars.text import GrammarText, choice
from k2cli.server.output.parameter_types import STRING, Schema
from k2cli.server.structured.call_forms.parameters import NotHeld, constraints
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
from k2cli.server.structured.call_forms.typed_values import ValueSchema

_QUOTED = r"'([^'\\\x00-\x1f\x7f]|\\['\"\\nrt])*'"
"""A string as LFM2.5's template writes it."""
_WORDS = {"boolean": ("True", "False"), "null": ("None",)}


def pythonic(functions: Sequence[Function], text: GrammarText, *, several: bool) -> Calls:
    """LFM2: a list between two markers."""
    opens, end = "<|tool_call_start|>", "<|tool_call_end|>"
    calls = _list("pythonic", (opens, end), functions, text, several=several)
    return Calls((Opening(opens, f"{calls} {text.literal(end)}"),))


def llama4_pythonic(functions: Sequence[Function], text: GrammarText, *, several: bool) -> Calls:
    """Llama 4: a list in place of an answer, with or without markers around it."""
    opens, end = "<|python_start|>", "<|python_end|>"
    calls = _list("llama4_pythonic", (opens, end), functions, text, several=several)
    return Calls((Opening(opens, f"{calls} {text.literal(end)}"),), bare=calls)


def _list(
    form: str,
    markers: Sequence[str],
    functions: Sequence[Function],
    text: GrammarText,
    *,
    several: bool,
) -> str:
    check_tokens(form, markers, functions, text)
    comma = text.terminal(", ?")

    def write(key: str, value: ValueSchema) -> str:
        if not _is_name(key):
            raise NotHeld("its key is no name in Python")
        words = [word for part in value.branches() for word in _words_of(part)]
        texts = [_QUOTED] if any(_is_free(part) for part in value.branches()) else []
        ways = (*map(text.letters, words), *map(text.terminal, texts))
        values = choice(value.json(text, [value.schema]), *ways)
        return f"{text.letters(f'{key}=')} {values}"

    each = []
    for function in functions:
        if not all(map(_is_name, function.name.split("."))):
            raise refuse(form, function, "its name is no name in Python")
        lists = argument_lists(form, function, write)
        arguments = choice(*(separated(text, items, comma) for items in lists))
        each.append(f"{text.letters(f'{function.name}(')} {arguments} {text.letters(')')}")
    calls = joined(text.rule(choice(*each)), comma, several=several)
    return text.rule(f"{text.letters('[')} {calls} {text.letters(']')}")


def _is_free(part: Schema) -> bool:
    """Return True if a part of a schema allows any string."""
    if not isinstance(part, dict):
        return part
    return constraints(part) <= {"type"} and part.get("type", STRING) == STRING


def _words_of(part: Schema) -> Sequence[str]:
    """Return the words that Python has for all values of a type."""
    kind = part.get("type") if isinstance(part, dict) and constraints(part) == {"type"} else None
    return _WORDS.get(kind, ()) if isinstance(kind, str) else ()


def _is_name(text: str) -> bool:
    """Return True if Python reads a name as it is written."""
    normal = unicodedata.normalize("NFKC", text) == text
    return normal and text.isidentifier() and not keyword.iskeyword(text) and text != "__debug__"
