"""Stand-in for the module of branch ``calls18``, which has all forms: same names, two forms."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from k2cli.grammars.text import GrammarText, choice
from k2cli.server.errors import invalid
from k2cli.server.output.tool_format import ToolFormat


@dataclass(frozen=True, slots=True)
class Function:
    """A function that a model may call; ``field`` is its place in the client's body."""

    name: str
    parameters: dict[str, Any] | None = None
    strict: bool = False
    field: str = "tools"


def call_grammar(
    form: ToolFormat, functions: Sequence[Function], text: GrammarText, *, several: bool
) -> str:
    """Return an expression for calls with all their markers."""
    schemas = [text.json(each.parameters or {"type": "object"}) for each in functions]
    pairs = list(zip(functions, schemas, strict=True))
    match form.name:
        case "kimi_k2":
            begin, between = "<|tool_call_begin|>", "<|tool_call_argument_begin|>"
            calls = choice(
                *(
                    f"{text.literal(begin + f'functions.{each.name}:')} "
                    f"{text.terminal('[0-9]{1,4}')} {text.literal(between)} {schema} "
                    f"{text.literal('<|tool_call_end|>')}"
                    for each, schema in pairs
                )
            )
            ends = ("<|tool_calls_section_begin|>", "<|tool_calls_section_end|>")
            return (
                f"{text.literal(ends[0])} ({calls}){'+' if several else ''} {text.literal(ends[1])}"
            )
        case "json_tools":
            begin, end = text.literal("<tool_call>"), text.literal("</tool_call>")
            heads = [
                json.dumps('{"name": ' + json.dumps(each.name) + ', "arguments": ')
                for each in functions
            ]
            calls = choice(
                *(
                    f'{begin} "\\n"? {head} {schema} "}}" "\\n"? {end}'
                    for head, schema in zip(heads, schemas, strict=True)
                )
            )
            return f'{calls} ("\\n"? {calls})*' if several else calls
        case "harmony":
            return choice(
                *(
                    f"{text.literal(f'<|channel|>commentary to=functions.{each.name} ')} "
                    f"{text.literal('<|constrain|>json<|message|>')} {schema}"
                    for each, schema in pairs
                )
            )
        case _:
            message = f"calls in this model's format ({form.name}) cannot be held to a grammar"
            raise invalid(message, functions[0].field)


def calls_after_text(
    form: ToolFormat, functions: Sequence[Function], text: GrammarText, *, several: bool
) -> str:
    """Return an expression for an answer of any text, and then calls or none."""
    calls = call_grammar(form, functions, text, several=several)
    if form.name == "harmony":
        return choice(calls, f"{text.literal('<|channel|>final<|message|>')} {text.any_text()}")
    begin = text.literal(form.opens[0])
    if not begin.startswith('"'):
        return f"{text.any_text()} ({calls})?"
    text._rules.append(f"FREE: {_free(form.opens)}")
    return choice("FREE", f"{text.text_until(form.opens[0])} {calls.removeprefix(begin)}")


def _escaped(marker: str) -> str:
    return marker.replace("|", "\\|")


def _free(markers: Sequence[str]) -> str:
    return f"/(?s:.*)/ & ~/(?s:.*)({'|'.join(map(_escaped, markers))})(?s:.*)/"
