"""The part of a grammar that an answer's text must match, from the format that a client wants."""

from __future__ import annotations

import json
import re
from typing import Any

from k2cli.grammars.check import grammar_problem
from k2cli.grammars.gbnf import lark_from_gbnf
from k2cli.grammars.text import GrammarText, escaped
from k2cli.server.client_request import AnswerFormat
from k2cli.server.errors import invalid
from k2cli.server.structured.json_schema import checked_schema

MAX_PATTERN_LETTERS = 64 * 1024
MAX_LARK_LETTERS = 64 * 1024
MAX_LARK_RULES = 1_000
"""llguidance follows rules by recursion: 4,000 in a row overflow a stack of 8 MiB."""
MAX_LARK_CONJUNCTIONS = 12
"""``&`` of a grammar. Each may double the lexer's states: 20 take 2 s and 200 MB, 40 all memory."""
MAX_CHOICES = 10_000

_RULE = re.compile(r"^[ \t]*[?!]?[\w-]+[^:\n]*:", re.MULTILINE)
_TEXTS = re.compile(r'"(?:\\.|[^"\\\n])*"|/(?:\\.|[^/\\\n])+/|//.*')
_INLINE_SCHEMA = re.compile(r"%json(?![\w-])\s*")
_INLINE_GRAMMAR = re.compile(r"%lark(?![\w-])")


def format_expression(wanted: AnswerFormat, text: GrammarText) -> str:
    """Add the rules of a format to a grammar, and return their expression.

    Raises:
        ApiError: 400 if the format is not valid or cannot be held.
    """
    match wanted.kind:
        case "json_object":
            return text.json({"type": "object"})
        case "json_schema":
            return text.json(checked_schema(wanted.value, wanted.field, lenient=not wanted.strict))
        case "regex":
            return text.terminal(_checked_pattern(wanted.value, wanted.field))
        case "choice":
            return _choices(wanted.value, text)
        case "gbnf":
            try:
                lark = lark_from_gbnf(wanted.value)
            except ValueError as error:
                raise invalid(f"{wanted.field}: {error}", wanted.field) from error
            return text.lark(_checked_lark(lark, wanted.field))
        case "lark":
            return text.lark(_checked_lark(wanted.value, wanted.field))


def is_json(wanted: AnswerFormat) -> bool:
    """Return True if whitespace around the text is no part of its value."""
    return wanted.kind in ("json_object", "json_schema")


def _choices(texts: list[str], text: GrammarText) -> str:
    # One terminal: as many ways of a rule would exceed the limit of the parser.
    return text.terminal("|".join(map(escaped, texts)))


def _checked_pattern(pattern: str, field: str) -> str:
    if len(pattern) > MAX_PATTERN_LETTERS:
        message = f"{field}: has {len(pattern)} letters, and the most are {MAX_PATTERN_LETTERS}"
        raise invalid(message, field)
    text = GrammarText({})
    problem = grammar_problem(text.build(text.terminal(pattern)))
    # Around the cause, llguidance shows a grammar that the client has not written.
    if problem is not None and "regex parse error" in problem:
        problem = problem.rpartition("\nerror: ")[2].partition("\n")[0]
    elif problem is not None and "lexer error" in problem:
        problem = "is no regular expression"
    _refuse_problem(problem, field)
    return pattern


def _checked_lark(grammar: str, field: str) -> str:
    """Check a grammar, and the schemas in it as any other schema."""
    if len(grammar) > MAX_LARK_LETTERS:
        message = f"{field}: has {len(grammar)} letters, and the most are {MAX_LARK_LETTERS}"
        raise invalid(message, field)
    rules = len(_RULE.findall(grammar))
    if rules > MAX_LARK_RULES:
        raise invalid(f"{field}: has {rules} rules, and the most are {MAX_LARK_RULES}", field)
    conjunctions = _TEXTS.sub("", grammar).count("&")
    if conjunctions > MAX_LARK_CONJUNCTIONS:
        message = f"{field}: has {conjunctions} '&', and the most are {MAX_LARK_CONJUNCTIONS}"
        raise invalid(message, field)
    if _INLINE_GRAMMAR.search(grammar):
        raise invalid(f"{field}: %lark is not supported: write the rules themselves", field)
    grammar = _with_checked_schemas(grammar, field)
    text = GrammarText({})
    _refuse_problem(grammar_problem(text.build(text.lark(grammar))), field)
    return grammar


def _with_checked_schemas(grammar: str, field: str) -> str:
    """Replace each schema behind ``%json`` by its normal form."""
    parts: list[str] = []
    decoder = json.JSONDecoder()
    at = 0
    while found := _INLINE_SCHEMA.search(grammar, at):
        place = f"{field}: %json"
        try:
            schema, end = decoder.raw_decode(grammar, found.end())
        except (ValueError, RecursionError) as error:
            raise invalid(f"{place}: is not JSON", field) from error
        normal: dict[str, Any] = checked_schema(schema, place, param=field)
        parts += [grammar[at : found.end()], json.dumps(normal)]
        at = end
    return "".join((*parts, grammar[at:]))


def _refuse_problem(problem: str | None, field: str) -> None:
    if problem is None:
        return
    lines = [line.strip() for line in problem.splitlines() if line.strip()]
    raise invalid(f"{field}: {' / '.join(lines)[:400]}", field)
