"""Texts of grammars, compiled and tried."""

from __future__ import annotations

import pytest

from k2cli.grammars.check import grammar_problem
from k2cli.grammars.text import GrammarText, choice, escaped
from tests.server.structured.sampling import Model, model

MARKER, END = "<|tool_call_begin|>", "<|tool_call_end|>"


def _accepts(of: Model, grammar: str, text: str, *, letters: bool = False) -> bool:
    matcher = of.matcher(grammar)
    ids = of.letter_ids(text) if letters else of.ids(text)
    return bool(matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting())


@pytest.fixture
def of() -> Model:
    return model("kimi_k2")


def test_letters_and_patterns_are_exact(of: Model) -> None:
    odd = 'a.b*"\\/ {é}\n#&~-^$|'
    text = of.text()
    grammar = text.build(f"{text.letters(odd)} {text.terminal(escaped(odd))}")
    assert _accepts(of, grammar, odd + odd)
    assert not _accepts(of, grammar, odd + odd.replace(".", "x"))
    grammar = text.build(f"{text.literal(MARKER)} {text.letters(MARKER)}")
    ids = [*of.ids(MARKER), *of.letter_ids(MARKER)]
    assert of.matcher(grammar).try_consume_tokens(ids) == len(ids)


@pytest.mark.parametrize("end", ["</a>", END, f"</{END}a>"])
def test_text_up_to_an_end(of: Model, end: str) -> None:
    text = of.text()
    grammar = text.build(f"{text.text_until(end)} {text.letters('!')}")
    for body in ("", "a", "</", "<</b>\né", "</a"):
        assert _accepts(of, grammar, f"{body}{end}!")
        assert not _accepts(of, grammar, f"{body}{end}")
    assert not _accepts(of, grammar, f"a{end}b{end}!")


def test_texts_with_patterns_and_without_letters(of: Model) -> None:
    text = of.text()
    grammar = text.build(text.text("[a-z]+", "(?s:.{2,4})", without=["no", "<"], around=" *"))
    for word, allowed in (("ab", True), (" abcd ", True), ("a", False), ("abno", False)):
        assert _accepts(of, grammar, word) == allowed
    grammar = text.build(text.text(without=["no"]))
    assert _accepts(of, grammar, "é<n\no")
    assert not _accepts(of, grammar, "é<no")
    no_utf8 = of.letters[0xFF]
    assert not of.matcher(grammar).consume_token(no_utf8)


def test_rules_are_written_once_and_may_be_recursive(of: Model) -> None:
    text = of.text()
    assert text.text() == text.text()
    assert text.json({"type": "string"}) == text.json({"type": "string"})
    assert text.text_until("x") == text.text_until("x") != text.text_until("y")

    def body(name: str) -> str:
        return choice(text.letters("."), f"{text.letters('(')} {name} {text.letters(')')}")

    grammar = text.build(text.recursive_rule(body))
    assert grammar_problem(grammar) is None
    assert _accepts(of, grammar, "((.))")
    assert not _accepts(of, grammar, "((.)")


def test_markers_that_are_tokens(of: Model) -> None:
    text = of.text()
    assert (text.is_token(MARKER), text.is_token(MARKER + "x")) == (True, False)
    assert (text.has_token(f"x{MARKER}"), text.has_token("x")) == (True, False)
    assert text.spelled([MARKER, "<a>", f"</{END}>"]) == ("<a>",)
    assert GrammarText({}).spelled([MARKER]) == (MARKER,)
