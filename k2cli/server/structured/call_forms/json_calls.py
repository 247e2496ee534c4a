"""Grammars of calls whose arguments are one JSON object.

Each follows what the chat templates of its models write for calls in a conversation, with the
whitespace and the alternatives that ``server.output`` reads as the same.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from k2cli.grammars.text import GrammarText, choice, escaped, optional
from k2cli.server.structured.call_forms.parts import (
    Calls,
    Function,
    Opening,
    arguments_object,
    gap,
    joined,
    refuse,
)

_NUMBER = "(0|[1-9][0-9]{0,3})"
_SHORT_ID = "[a-zA-Z0-9]{9}"
_LIST_BEGIN, _LIST_END = r" ?\[[ \n]?", r"[ \n]?\]"


def _refuse_names(form: str, functions: Sequence[Function], letters: str) -> None:
    for function in functions:
        for letter in letters:
            if letter in function.name:
                raise refuse(form, function, f"its name has the letter {letter!r}")


# --- a header, then the object ---


def kimi_k2(functions: Sequence[Function], text: GrammarText, *, several: bool) -> Calls:
    """``functions.NAME:NUMBER``, where the number counts all calls of the conversation."""
    _refuse_names("kimi_k2", functions, "{")
    begin, end = text.literal("<|tool_call_begin|>"), text.literal("<|tool_call_end|>")
    argument = text.literal("<|tool_call_argument_begin|>")
    each = (
        f"{text.terminal(escaped(f'functions.{function.name}:') + _NUMBER)} {argument} "
        f"{arguments_object('kimi_k2', text, function)}"
        for function in functions
    )
    call = text.rule(f"{begin} {choice(*each)} {end}")
    calls = f"{call}+" if several else call
    section_end = text.literal("<|tool_calls_section_end|>")
    return Calls((Opening("<|tool_calls_section_begin|>", f"{calls} {section_end}"),))


_DEEPSEEK_KIND = "function"


def deepseek_v3(functions: Sequence[Function], text: GrammarText, *, several: bool) -> Calls:
    """V3.1 writes the name before the separator; V3 and R1 ``function``, and then a fence."""
    begin, separator = text.literal("<｜tool▁call▁begin｜>"), text.literal("<｜tool▁sep｜>")
    kind = text.letters(_DEEPSEEK_KIND)
    each = []
    for function in functions:
        arguments = arguments_object("deepseek_v3", text, function)
        before, after = text.letters(f"{function.name}\n```json\n"), text.letters("\n```")
        each.append(f"{kind} {separator} {before} {arguments} {after}")
        if function.name != _DEEPSEEK_KIND:
            each.append(f"{text.letters(function.name)} {separator} {arguments}")
    call = text.rule(f"{begin} {choice(*each)} {text.literal('<｜tool▁call▁end｜>')}")
    calls = joined(call, gap(text), several=several)
    section_end = f"{gap(text)} {text.literal('<｜tool▁calls▁end｜>')}"
    return Calls((Opening("<｜tool▁calls▁begin｜>", f"{calls} {section_end}"),))


def mistral(functions: Sequence[Function], text: GrammarText, *, several: bool) -> Calls:
    """``NAME[ARGS]{...}`` for vocabularies with that token, or a list of objects."""
    marker = "[TOOL_CALLS]"
    objects = (
        _named_object("mistral", text, each, "arguments", with_id=True) for each in functions
    )
    inner = joined(text.rule(choice(*objects)), text.terminal(r"[ \n]?,[ \n]?"), several=several)
    list_of = f"{text.terminal(_LIST_BEGIN)} {inner} {text.terminal(_LIST_END)}"
    if not text.is_token("[ARGS]"):
        return Calls((Opening(marker, list_of),))
    _refuse_names("mistral", functions, " []{}")
    arguments = text.literal("[ARGS]")
    call_id = ""
    if text.is_token("[CALL_ID]"):
        call_id = optional(f"{text.literal('[CALL_ID]')} {text.terminal(_SHORT_ID)}")
    each = (
        f"{text.letters(function.name)} {call_id} {arguments} {gap(text)} "
        f"{arguments_object('mistral', text, function)}"
        for function in functions
    )
    calls = joined(text.rule(choice(*each)), text.literal(marker), several=several)
    return Calls((Opening(marker, choice(calls, list_of)),))


# --- objects with the name and the arguments ---


def _named_object(
    form: str, text: GrammarText, function: Function, key: str, *, with_id: bool = False
) -> str:
    """Return an expression for ``{"name": NAME, KEY: {...}}``, with a short id if that may be."""
    name = escaped(json.dumps(function.name, ensure_ascii=False))
    call_id = rf'"id": ?"{_SHORT_ID}"'
    before, after = (f"({call_id}, ?)?", f"(, ?{call_id})?") if with_id else ("", "")
    begin = text.terminal(rf'\{{[ \n]{{0,4}}{before}"name": ?{name},[ \n]{{0,4}}"{key}": ?')
    end = text.terminal(rf"{after}[ \n]{{0,4}}\}}")
    return f"{begin} {arguments_object(form, text, function)} {end}"


def json_tools(functions: Sequence[Function], text: GrammarText, *, several: bool) -> Calls:
    """Hermes and Qwen: each object between two markers, on lines of its own."""
    marker = "<tool_call>"
    objects = text.rule(
        choice(*(_named_object("json_tools", text, each, "arguments") for each in functions))
    )
    call = f"{gap(text)} {objects} {gap(text)} {text.literal('</tool_call>')}"
    return Calls((_repeated(text, marker, call, several=several),))


def _repeated(text: GrammarText, marker: str, call: str, *, several: bool) -> Opening:
    """Return the opening of calls that have a section each."""
    call = text.rule(call)
    return Opening(marker, joined(call, f"{gap(text)} {text.literal(marker)}", several=several))


def llama3_json(functions: Sequence[Function], text: GrammarText, *, several: bool) -> Calls:
    """Llama 3: objects in place of an answer, with or without a marker before them."""
    call = text.rule(
        choice(*(_named_object("llama3_json", text, each, "parameters") for each in functions))
    )
    calls = text.rule(joined(call, text.terminal("; ?"), several=several))
    return Calls((Opening("<|python_tag|>", calls),), bare=calls)


# --- gpt-oss: a message for each call ---


def harmony(functions: Sequence[Function], text: GrammarText, *, several: bool) -> Calls:
    """Messages to functions. The prompt, or the message before, ends with ``<|start|>assistant``.

    The recipient may stand before or after the channel: models write the latter, and the template
    the former. A model's vocabulary has ``<|call|>`` among its stop tokens, so it is not required.
    """
    _refuse_names("harmony", functions, " <")
    channel, body = text.literal("<|channel|>"), text.literal("<|message|>")
    constrained = f"({text.terminal(' ')}? {text.literal('<|constrain|>')} {text.letters('json')})"
    kind = optional(choice(constrained, text.letters(" json")))
    each = []
    for function in functions:
        recipient = text.letters(f" to=functions.{function.name}")
        headers = (
            f"{channel} {text.letters(f'commentary to=functions.{function.name}')} {kind}",
            f"{recipient} {channel} {text.letters('commentary')} {kind}",
        )
        each.append(f"{choice(*headers)} {body} {arguments_object('harmony', text, function)}")
    call = text.rule(choice(*each))
    end, start = text.literal("<|call|>"), text.literal("<|start|>")
    following = f"{end} {start} {text.letters('assistant')}"
    return Calls((), bare=f"{joined(call, following, several=several)} {end}?")
