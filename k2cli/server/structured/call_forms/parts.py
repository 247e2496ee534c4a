"""Parts of the grammars of calls: functions, places where calls begin, and objects of arguments."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from k2cli.grammars.check import grammar_problem
from k2cli.grammars.text import GrammarText, choice
from k2cli.server.errors import ApiError, invalid
from k2cli.server.output.emitter import MAX_NAME_LETTERS
from k2cli.server.output.parameter_types import Schema

GAP = r"[ \n]{1,4}"
"""Whitespace that models write between the markers of calls."""


@dataclass(frozen=True, slots=True)
class Function:
    """A function that a model may call.

    Attributes:
        name: its name.
        parameters: the JSON schema of its arguments; None or empty for any object.
        strict: True if arguments must obey the whole schema, so that what a grammar cannot express
            is refused; False to hold them to what it can express.
        field: the place of the function in the client's body, for errors.
    """

    name: str
    parameters: dict[str, Any] | None = None
    strict: bool = False
    field: str = "tools"


@dataclass(frozen=True, slots=True)
class Opening:
    """A marker that begins calls, and the expression of what follows it."""

    marker: str
    rest: str


@dataclass(frozen=True, slots=True)
class Calls:
    """Expressions of calls in one form.

    Attributes:
        openings: the ways to begin calls; the first ``usual`` of them are what models are trained
            to write, and the others what they may write besides.
        usual: see ``openings``.
        bare: the expression of calls without a marker, with which an answer may begin.
    """

    openings: tuple[Opening, ...]
    usual: int = 1
    bare: str | None = None


def refuse(form: str, function: Function, why: str) -> ApiError:
    """Make the error for a function whose calls cannot be held to a grammar."""
    message = (
        f"calls of the function '{function.name}' cannot be held to a grammar in this model's "
        f"format ({form}): {why}"
    )
    return invalid(message, function.field)


def check_names(form: str, functions: Sequence[Function]) -> None:
    """Check what no form can write.

    Raises:
        ApiError: if there is no function, or a name that the parser does not take.
    """
    if not functions:
        raise invalid("there is no function to call", "tools")
    for function in functions:
        if not 0 < len(function.name) <= MAX_NAME_LETTERS:
            raise refuse(form, function, f"its name has no or over {MAX_NAME_LETTERS} letters")
        if function.name != function.name.strip() or not function.name.isprintable():
            raise refuse(form, function, "its name has whitespace around it or control characters")


def check_tokens(
    form: str, markers: Sequence[str], functions: Sequence[Function], text: GrammarText
) -> None:
    """Check that markers are tokens, since strings between them may have the same letters.

    Raises:
        ApiError: if one is not.
    """
    for marker in markers:
        if not text.is_token(marker):
            message = (
                f"calls in this model's format ({form}) cannot be held to a grammar, because its "
                f"tokenizer has no token {marker}"
            )
            raise invalid(message, functions[0].field)


def gap(text: GrammarText) -> str:
    """Return an expression for whitespace that may be left out."""
    return f"{text.terminal(GAP)}?"


def joined(calls: str, separator: str, *, several: bool) -> str:
    """Return an expression for one call or several with something between them."""
    return f"{calls} ({separator} {calls})*" if several else calls


def separated(text: GrammarText, items: Sequence[tuple[str, bool]], separator: str) -> str:
    """Return an expression for items in their order with separators between them.

    Args:
        items: expressions, each with True if it must be there.
        separator: an expression.
    """
    rest = ""
    ways: list[str] = []
    for item, required in reversed(items):
        ways = [f"{item} {rest}", *([] if required else ways)]
        more = f"{separator} {item}"
        rest = text.rule(f"{more if required else f'({more})?'} {rest}")
    if not any(required for _, required in items):
        ways.append('""')
    return choice(*ways)


def arguments_object(form: str, text: GrammarText, function: Function) -> str:
    """Return an expression for a JSON object that obeys the schema of a function.

    Raises:
        ApiError: if it must, and a grammar cannot express the schema.
    """
    schema = object_schema(form, function)
    return text.json(schema, lenient=not function.strict)


def object_schema(form: str, function: Function) -> dict[str, Any]:
    """Return the schema of a function's arguments, or of any if a grammar cannot express it.

    Raises:
        ApiError: in that case, if the function is strict.
    """
    schema = as_object(function.parameters)
    why = json_problem(schema, strict=function.strict)
    if why is not None and function.strict:
        raise refuse(form, function, f"its parameters: {why}")
    return {"type": "object"} if why else schema


def as_object(parameters: dict[str, Any] | None) -> dict[str, Any]:
    """Return a schema of arguments that allows objects alone."""
    if not parameters:
        return {"type": "object"}
    kind = parameters.get("type")
    if "type" not in parameters or (isinstance(kind, list) and "object" in kind):
        return {**parameters, "type": "object"}
    return parameters


def json_problem(schema: Schema, *, strict: bool) -> str | None:
    """Return why llguidance cannot express a schema; None if it can."""
    text = GrammarText({})
    return grammar_problem(text.build(text.json(schema, lenient=not strict)))
