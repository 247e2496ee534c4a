"""Masks for answers, against those of llguidance used directly."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from k2cli.grammars import limits, matchers
from k2cli.grammars.matchers import Compiler, GrammarError, Matcher
from k2cli.grammars.text import GrammarText
from k2cli.protocol import Grammar
from lab.toy_k2.vocabulary import VOCABULARY_SIZE, special_id
from tests.support.grammars import LIST, SCHEMA, Vocabulary, json_schema, lark, tokens_of

ROWS = VOCABULARY_SIZE + 40
END = special_id("<|im_end|>")
OTHER_END = special_id("[EOS]")


@pytest.fixture(scope="module")
def compiler(toy_k2: Path) -> Compiler:
    return Compiler(toy_k2, ROWS, [END])


@pytest.fixture(scope="module")
def vocabulary(toy_k2: Path) -> Vocabulary:
    return Vocabulary(toy_k2, ROWS, END)


def _open(compiler: Compiler, grammar: Grammar, stops: tuple[int, ...] = (END,)) -> Matcher:
    return compiler.open(grammar.text, grammar.prefix, stops)


@pytest.mark.parametrize("grammar", [lark(LIST), json_schema(SCHEMA)])
def test_each_mask_is_that_of_llguidance(
    compiler: Compiler, vocabulary: Vocabulary, grammar: Grammar
) -> None:
    answer = _open(compiler, grammar)
    direct = vocabulary.matcher(grammar)
    allowed = json.dumps({"city": "Paris", "degrees": -7, "sky": "clear"})
    text = allowed if grammar.text == json_schema(SCHEMA).text else '["abc",1,"xyz"]'
    tokens = vocabulary.encode(text)
    for token in tokens:
        bits = answer.mask()
        assert bits is not None
        assert bits == direct.compute_bitmask()
        assert token in tokens_of(bits) <= set(range(VOCABULARY_SIZE))
        answer.take([token])
        direct.consume_token(token)
    assert answer.mask() is None


def test_an_answer_may_end_only_where_its_grammar_does(compiler: Compiler) -> None:
    answer = _open(compiler, lark('start: "ab" "c"?'))
    a, b, c = (ord(letter) for letter in "abc")
    assert END not in tokens_of(answer.mask() or b"")
    answer.take([a])
    answer.take([b])
    assert tokens_of(answer.mask() or b"") == {c, END}
    answer.take([c])
    assert answer.mask() is None


@pytest.mark.parametrize("stops", [(OTHER_END,), (END, OTHER_END), (), (OTHER_END, 10**6)])
def test_another_request_may_have_other_stop_tokens(
    compiler: Compiler, stops: tuple[int, ...]
) -> None:
    answer = _open(compiler, lark('start: "a"+'), stops)
    assert tokens_of(answer.mask() or b"") == {ord("a")}
    answer.take([ord("a")])
    allowed = tokens_of(answer.mask() or b"")
    assert {END, OTHER_END} & allowed == {END, OTHER_END} & set(stops)


def test_a_stop_token_of_text_does_not_end_an_incomplete_answer(compiler: Compiler) -> None:
    answer = _open(compiler, lark('start: "a"~2 "b"?'), (END, ord("a"), ord("b")))
    with pytest.raises(GrammarError, match="no token of the model's vocabulary"):
        answer.mask()
    answer = _open(compiler, lark('start: "x" /[ab]/ "y"'), (END, ord("a")))
    answer.take(b"x")
    allowed = tokens_of(answer.mask() or b"")
    assert ord("b") in allowed
    assert ord("a") not in allowed


def test_answers_of_one_grammar_do_not_share_their_state(compiler: Compiler) -> None:
    one, other = (_open(compiler, lark('start: "ab"')) for _ in range(2))
    one.take([ord("a")])
    assert tokens_of(one.mask() or b"") == {ord("b")}
    assert ord("a") in tokens_of(other.mask() or b"")


def test_a_prefix_belongs_to_the_answer_its_tokens_of_their_own_included(
    compiler: Compiler,
) -> None:
    think, end_think = special_id("<think>"), special_id("</think>")
    made = GrammarText({"<think>": think, "</think>": end_think})
    text = made.build(
        f"{made.literal('<think>')} {made.text_until('</think>')} {made.json(SCHEMA)}"
    )
    answer = _open(compiler, Grammar(text, '<think>so be it</think>{"city": "Pa'))
    answer.take(b"ris")
    answer.take(b'"')
    assert ord(",") in tokens_of(answer.mask() or b"")
    with pytest.raises(GrammarError, match="beginning of the answer, which the request gives"):
        _open(compiler, Grammar(text, '<think>so be it</think>{"town'))


def test_what_cannot_be_obeyed_is_refused_in_few_words(compiler: Compiler) -> None:
    made = GrammarText({})
    with pytest.raises(GrammarError, match="nope") as refusal:
        compiler.open(made.build(made.lark("start: ( nope")), "", [END])
    assert len(refusal.value.message) < 500
    answer = _open(compiler, lark('start: "ab"'))
    with pytest.raises(GrammarError, match="doesn't satisfy the grammar") as refusal:
        answer.take(b"x")
    assert "<state>" not in refusal.value.message
    nothing = _open(compiler, lark(r"start: /[^\s\S]/"))
    with pytest.raises(GrammarError, match="no token of the model's vocabulary can continue"):
        nothing.mask()


def test_few_compiled_grammars_are_kept(
    compiler: Compiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(matchers, "KEPT_GRAMMARS", 3)
    for number in range(5):
        _open(compiler, lark(f'start: "{number}"'))
    assert len(compiler._compiled) == 3
    monkeypatch.setattr(matchers, "KEPT_BYTES", 500)
    _open(compiler, lark(f'start: "{"long" * 200}"'))
    assert len(compiler._compiled) == 1


def test_a_model_without_an_end_token_has_grammars_that_end(toy_k2: Path) -> None:
    compiler = Compiler(toy_k2, VOCABULARY_SIZE, [])
    answer = compiler.open(lark('start: "a" "b"?').text, "", [])
    answer.take(b"a")
    assert tokens_of(answer.mask() or b"") == {ord("b")}
    answer.take(b"b")
    assert answer.mask() is None


WIDE = lark("start: /(a|b)*a(a|b){9}!/")
"""Each text of ten letters is another state of the lexer."""


def _wide(compiler: Compiler, seed: int, letters: int) -> Matcher:
    answer = _open(compiler, WIDE)
    for letter in random.Random(seed).choices(b"ab", k=letters):
        assert letter in tokens_of(answer.mask() or b"")
        answer.take([letter])
    return answer


def test_a_full_lexer_ends_no_answer(toy_k2: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "MAX_LEXER_STATES", 400)
    compiler = Compiler(toy_k2, VOCABULARY_SIZE, [END])
    beside = _wide(compiler, 0, 50)
    first = compiler._compiled[WIDE.text]
    for seed in range(1, 8):
        _wide(compiler, seed, 100)
    assert compiler._compiled[WIDE.text] is not first  # it was filled, and is replaced
    beside.take(b"abbbabbbbb")
    assert ord("!") in tokens_of(beside.mask() or b"")
    beside.take(b"!")
    assert beside.mask() is None


def test_an_answer_that_exceeds_the_limit_of_a_step_harms_no_other(
    toy_k2: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "MAX_LEXER_STATES", 150)
    compiler = Compiler(toy_k2, VOCABULARY_SIZE, [END])
    with pytest.raises(GrammarError, match="is too large to be followed"):
        _wide(compiler, 0, 1000)
    _wide(compiler, 1, 20)


def test_what_is_too_wide_is_refused_in_plain_words(compiler: Compiler) -> None:
    names = {f"p{index}": {"type": "integer"} for index in range(3000)}
    answer = _open(compiler, json_schema({"type": "object", "properties": names}))
    with pytest.raises(GrammarError, match="ways to go on at one place, such as optional"):
        answer.take(b"{")
