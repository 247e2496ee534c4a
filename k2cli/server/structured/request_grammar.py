"""The grammar of a request: reasoning first, then an answer in the client's format, or calls.

Models mark reasoning and answers differently, so the markers around them are part of the grammar.
What it lets a model write, ``server.output`` reads as the same parts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from k2cli.grammars.check import grammar_problem
from k2cli.grammars.text import GrammarText, choice, optional
from k2cli.protocol import Grammar
from k2cli.server.client_request import AnswerFormat, AnswerOptions, OutputOptions, ToolChoice
from k2cli.server.errors import ApiError, invalid
from k2cli.server.output import harmony
from k2cli.server.output.output_format import OutputFormat
from k2cli.server.output.parser import ReasoningFormat
from k2cli.server.output.tool_format import ToolFormat
from k2cli.server.structured.answer_format import format_expression, is_json
from k2cli.server.structured.calls import Function, call_grammar, calls_after_text
from k2cli.server.structured.json_schema import checked_schema

_NEWLINES = r"\n{1,4}"
"""Newlines that models were trained to write after reasoning."""
_KIMI_K3 = "kimi_k3"
_K3_RESPONSE = "<|open|>response<|sep|>"
_SHOWN_NAMES = 20


@dataclass(frozen=True, slots=True)
class Prompted:
    """The prompt's end and the beginning of the answer.

    Attributes:
        prompt: the rendered prompt; empty for plain completions.
        continued: the beginning of the answer, if the prompt ends with it.
        tool_places: the place of each tool's schema in the client's body.
    """

    prompt: str = ""
    continued: str | None = None
    tool_places: Sequence[str] = ()


def request_grammar(
    form: OutputFormat, output: OutputOptions, options: AnswerOptions, prompted: Prompted
) -> Grammar | None:
    """Return the grammar that the answer to a request must obey, or None for any text.

    Args:
        form: the marks of the model's answers.
        output: how the answer's text is split; its tools are those that the model was shown.
        options: what the client wants.
        prompted: the prompt's end.

    Raises:
        ApiError: 400 for a choice of tools that are not there, and for formats and schemas that
            are not valid or cannot be held.
    """
    chosen, wanted = options.tool_choice, options.answer_format
    _check_choice(chosen, output.tools or [])
    tools = output.tools or []
    strict = any(tool["function"].get("strict") is True for tool in tools)
    limited = chosen.required or chosen.names is not None or strict
    if wanted is None and not limited:
        return None
    if form.tools is None and not limited:
        tools = []  # calls are text for this model
    functions = _functions(tools, prompted.tool_places, chosen.names)
    field = wanted.field if wanted is not None else chosen.field
    if options.ignore_stop_tokens:
        message = f"an answer that obeys '{field}' ends where that ends; leave one of them out"
        raise invalid(message, "k2.ignore_stop_tokens")
    text = GrammarText(form.token_ids)
    writer = _Writer(form, text, prompted, inside=output.begins_in_reasoning)
    several = output.parallel_calls and not (chosen.required and len(chosen.names or ()) == 1)
    calls = _Calls(form.tools, functions, several, field) if functions else None
    if not output.parsed:
        assert wanted is not None
        start, prefix = format_expression(wanted, text), ""
    else:
        start, prefix = writer.whole(wanted, calls, chosen)
    grammar = text.build(start)
    problem = grammar_problem(grammar)
    if problem is not None:
        raise invalid(f"{field}: the grammar of the answer cannot be used: {problem}", field)
    return Grammar(grammar, prefix)


# --- tools ----------------------------------------------------------------------------------------


def _check_choice(chosen: ToolChoice, tools: Sequence[dict[str, Any]]) -> None:
    names = [tool["function"]["name"] for tool in tools]
    if chosen.required and not names:
        raise invalid(f"{chosen.field}: a call is required, but there are no tools", chosen.field)
    for name in chosen.names or ():
        if name not in names:
            known = ", ".join(names[:_SHOWN_NAMES]) + (", ..." if len(names) > _SHOWN_NAMES else "")
            message = f"{chosen.field}: there is no tool '{name[:100]}'; the tools are: {known}"
            raise invalid(message, chosen.field)


def _functions(
    tools: Sequence[dict[str, Any]], places: Sequence[str], names: Sequence[str] | None
) -> list[Function]:
    """Return the functions that may be called, with checked schemas."""
    found: dict[str, Function] = {}
    for index, tool in enumerate(tools):
        function = tool["function"]
        name = function["name"]
        if names is not None and name not in names:
            continue
        place = places[index] if index < len(places) else f"tools[{index}].function.parameters"
        if name in found:
            raise invalid(f"tools has two functions '{name[:100]}'", place)
        strict = function.get("strict") is True
        found[name] = Function(name, _parameters(function, place, strict), strict, place)
    return list(found.values())


def _parameters(function: dict[str, Any], place: str, strict: bool) -> dict[str, Any]:
    """Return the schema of a function's arguments, which are an object."""
    schema = function.get("parameters")
    if not schema:
        return {"type": "object"}
    kinds = schema.get("type", "object")
    if "object" not in ([kinds] if isinstance(kinds, str) else kinds):
        if strict:
            raise invalid(f"{place}/type: arguments are an object", place)
        return {"type": "object"}
    try:
        found = checked_schema({**schema, "type": "object"}, place, lenient=not strict)
        return {"type": "object", **found}
    except ApiError:
        if strict:
            raise
        return {"type": "object"}  # agents send schemas that nobody has ever validated


@dataclass(frozen=True, slots=True)
class _Calls:
    """Functions that may be called, in the model's format."""

    form: ToolFormat | None
    functions: Sequence[Function]
    several: bool
    field: str

    @property
    def known_form(self) -> ToolFormat:
        if self.form is None:
            message = f"{self.field}: the format in which this model writes calls is not known"
            raise invalid(message, self.field)
        return self.form

    def alone(self, text: GrammarText) -> str:
        return call_grammar(self.known_form, self.functions, text, several=self.several)

    def after_text(self, text: GrammarText) -> str:
        return calls_after_text(self.known_form, self.functions, text, several=self.several)


# --- the whole answer -----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Writer:
    """Writer of the expression of a whole answer.

    Attributes:
        inside: True if the answer begins within reasoning.
    """

    form: OutputFormat
    text: GrammarText
    prompted: Prompted
    inside: bool

    def whole(
        self, wanted: AnswerFormat | None, calls: _Calls | None, chosen: ToolChoice
    ) -> tuple[str, str]:
        """Return the expression of an answer, and the beginning of it that is there already."""
        prefix = ""
        if calls is not None and chosen.required:
            body = self._calls(calls.alone(self.text))
        elif wanted is None:
            assert calls is not None
            body = self._after_text(calls)
        else:
            if calls is not None and calls.known_form.bare:
                message = (
                    f"{wanted.field}: this model writes calls as an answer of JSON, so that an "
                    "answer in a format could not be told from calls; give no tools, or require "
                    "a call with 'tool_choice'"
                )
                raise invalid(message, wanted.field)
            body = self._answer(wanted)
            prefix = self._prefix()
            if calls is not None:
                body = choice(body, self._calls(calls.alone(self.text)))
        gap = wanted is not None and not is_json(wanted) and self.form.trims_newlines
        return self._after_reasoning(self.text.rule(body), gap=gap), prefix

    @property
    def _reasoning(self) -> ReasoningFormat | None:
        return self.form.reasoning

    def _is(self, name: str) -> bool:
        return self._reasoning is not None and self._reasoning.name == name

    @property
    def _begun(self) -> bool:
        """True if the prompt ends within the answer's own text."""
        return self.prompted.continued is not None and not self.inside

    @property
    def _k3_opened(self) -> bool:
        """True if the prompt ends within a response of Kimi K3, as it does without reasoning."""
        return self._begun or self.prompted.prompt.endswith(_K3_RESPONSE)

    def _prefix(self) -> str:
        """Return the beginning of the answer's own text, if the prompt ends with one."""
        if not self._begun:
            return ""
        close = self._reasoning.close if self._reasoning else ""
        continued = self.prompted.continued or ""
        return continued.rpartition(close)[2] if close else continued

    # --- parts, with the markers around them ---

    def _answer(self, wanted: AnswerFormat) -> str:
        """Return the expression of an answer in a format."""
        value = format_expression(wanted, self.text)
        if is_json(wanted):
            value = f"{self.text.terminal(_NEWLINES)}? {value}"
        if self._is(harmony.NAME):
            if self._begun or self.prompted.prompt.endswith(harmony.BODY):
                return value
            constrained = f'" "? {self.text.literal("<|constrain|>json")}'
            kind = optional(constrained) if is_json(wanted) else ""
            return f"{self.text.literal('<|channel|>final')} {kind} {self._message()} {value}"
        if self._is(_KIMI_K3):
            begins = "" if self._k3_opened else self._marker(_K3_RESPONSE)
            return f"{begins} {value} {self._marker('<|close|>response<|sep|>')} {self._k3_end()}"
        return value

    def _calls(self, calls: str) -> str:
        if self._is(_KIMI_K3):
            begins = "" if self._k3_opened else self._marker(_K3_RESPONSE)
            empty = f"{begins} {self._marker('<|close|>response<|sep|>')}"
            return f"{optional(empty)} {calls} {self._k3_end()}"
        return f"{self.text.terminal(_NEWLINES)}? {calls}" if self._reasoning else calls

    def _after_text(self, calls: _Calls) -> str:
        found = calls.after_text(self.text)
        return f"{found} {self._k3_end()}" if self._is(_KIMI_K3) else found

    def _k3_end(self) -> str:
        return optional(self._marker("<|close|>message<|sep|>"))

    def _message(self) -> str:
        return self._marker(harmony.BODY)

    def _marker(self, marker: str) -> str:
        return self.text.literal(marker)

    # --- reasoning ---

    def _after_reasoning(self, body: str, *, gap: bool) -> str:
        """Return the expression of reasoning, as far as there is any, and what follows it.

        Args:
            gap: True for a body before which newlines are allowed after reasoning. They are no part
                of the answer there. Without reasoning they would be, and break its format.
        """
        form = self._reasoning
        if form is None:
            return body
        ends = self.text.text_until(form.close)
        if form.name == harmony.NAME:
            ends = f"{ends} {self._marker('<|start|>assistant')}"
            thought = self.text.rule(f"{self._marker(form.opens)} {ends}")
            if self.inside:
                return f"{ends} {thought}* {body}"
            at_start = not (self._begun or self.prompted.prompt.endswith(harmony.BODY))
            return f"{thought}* {body}" if at_start else body
        if gap:
            ends = f"{ends} {self.text.terminal(_NEWLINES)}?"
        if self.inside:
            return f"{ends} {body}"
        if self._begun or self.prompted.prompt.rstrip().endswith((form.close, _K3_RESPONSE)):
            return body
        before = f"{self.text.terminal(_NEWLINES)}?"
        return f"{optional(f'{before} {self._marker(form.opens)} {ends}')} {body}"
