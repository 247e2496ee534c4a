"""Grammars of tool calls, in each of the formats that models use.

Whatever a grammar here lets a model write, ``server.output`` reads as calls of the functions with
arguments that obey their schemas; and what the models' chat templates write for calls in a
conversation, the grammars allow.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol

from k2cli.grammars.text import ANY_TEXT, GrammarText, choice, optional
from k2cli.server.errors import invalid
from k2cli.server.output import harmony
from k2cli.server.output.known_formats import TOOL_FORMATS
from k2cli.server.output.source import WHITESPACE
from k2cli.server.output.tool_format import ToolFormat
from k2cli.server.output.typed_formats import PAIR_FORMATS, TYPED_FORMATS
from k2cli.server.structured.call_forms import gemma_calls, json_calls, python_calls
from k2cli.server.structured.call_forms.parts import Calls, Function, check_names
from k2cli.server.structured.call_forms.typed_calls import pair_calls, typed_calls

__all__ = ["Function", "call_grammar", "call_opening", "calls_after_text"]


class _Writer(Protocol):
    def __call__(
        self, functions: Sequence[Function], text: GrammarText, *, several: bool
    ) -> Calls: ...


_WRITERS: dict[str, _Writer] = {
    "kimi_k2": json_calls.kimi_k2,
    "deepseek_v3": json_calls.deepseek_v3,
    "json_tools": json_calls.json_tools,
    "llama3_json": json_calls.llama3_json,
    "mistral": json_calls.mistral,
    "harmony": json_calls.harmony,
    "pythonic": python_calls.pythonic,
    "llama4_pythonic": python_calls.llama4_pythonic,
    "function_gemma": gemma_calls.function_gemma,
    "gemma4": gemma_calls.gemma4,
    **{name: partial(typed_calls, name, TOOL_FORMATS[name].opens[0]) for name in TYPED_FORMATS},
    **{name: partial(pair_calls, name, TOOL_FORMATS[name].opens[0]) for name in PAIR_FORMATS},
}


def call_opening(form: ToolFormat) -> tuple[str, ...]:
    """Return the markers that begin calls; none if a call is a message of its own."""
    return (*form.opens, *form.loose_opens)


def call_grammar(
    form: ToolFormat, functions: Sequence[Function], text: GrammarText, *, several: bool
) -> str:
    """Return an expression for calls with all their markers.

    Args:
        form: the model's format.
        functions: those that may be called.
        text: gets the rules.
        several: True for one call or more, False for exactly one.

    Raises:
        ApiError: 400 if calls of these functions cannot be held to a grammar in this format.
    """
    calls = _calls(form, functions, text, several=several)
    ways = [f"{text.literal(way.marker)} {way.rest}" for way in calls.openings[: calls.usual]]
    return choice(*([calls.bare] if calls.bare else []), *ways)


def calls_after_text(
    form: ToolFormat, functions: Sequence[Function], text: GrammarText, *, several: bool
) -> str:
    """Return an expression for an answer of any text, and then calls or none.

    The text cannot have a marker of calls in it. Where texts are messages of their own (gpt-oss,
    Kimi K3), their markers are part of the expression.

    Args:
        form, functions, text, several: see ``call_grammar``.

    Raises:
        ApiError: see ``call_grammar``.
    """
    calls = _calls(form, functions, text, several=several)
    if (write := _MESSAGES.get(form.name)) is not None:
        return write(text, calls)
    markers = call_opening(form)
    patterns: tuple[str, ...] = ()
    if form.bare:
        # Text that begins with such a letter is read as a call.
        patterns = (rf"[{WHITESPACE}]*([^{re.escape(form.bare)}{WHITESPACE}]{ANY_TEXT})?",)
    ways = [calls.bare] if calls.bare else []
    for way in calls.openings:
        others = text.spelled(marker for marker in markers if marker != way.marker)
        ways.append(f"{text.text_until(way.marker, *patterns, without=others)} {way.rest}")
    return choice(*ways, text.text(*patterns, without=text.spelled(markers)))


def _calls(
    form: ToolFormat, functions: Sequence[Function], text: GrammarText, *, several: bool
) -> Calls:
    check_names(form.name, functions)
    write = _WRITERS.get(form.name)
    if write is None:
        message = f"calls in this model's format ({form.name}) cannot be held to a grammar"
        raise invalid(message, functions[0].field)
    return write(functions, text, several=several)


def _harmony_messages(text: GrammarText, calls: Calls) -> str:
    assert calls.bare is not None
    spelled = text.spelled(harmony.TOKENS)
    channel, body = text.literal("<|channel|>"), text.literal("<|message|>")
    preamble = (
        f"{channel} {text.letters('commentary')} {body} "
        f"{text.text_until('<|end|>', without=spelled)} {text.literal('<|start|>assistant')}"
    )
    final = f"{channel} {text.letters('final')} {body} {text.text(without=spelled)}"
    return choice(f"{optional(preamble)} {text.rule(calls.bare)}", final)


def _k3_messages(text: GrammarText, calls: Calls) -> str:
    (way,) = calls.openings
    begin = text.literal("<|open|>response<|sep|>")
    end = "<|close|>response<|sep|>"
    # Without reasoning, the prompt has it already.
    response = f"{optional(begin)} {text.text_until(end, without=text.spelled((end, way.marker)))}"
    some = text.rule(f"{text.literal(way.marker)} {way.rest}")
    return choice(f"{response} {some}?", some)


_MESSAGES: dict[str, Callable[[GrammarText, Calls], str]] = {
    "harmony": _harmony_messages,
    "kimi_k3": _k3_messages,
}
