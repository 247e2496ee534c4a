"""Generated answers: markers in any order, cut anywhere."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator

import pytest

from k2cli.server.client_request import OutputOptions
from k2cli.server.output import source as source_module
from k2cli.server.output.events import AnswerText, CallArguments, CallBegan, ReasoningText
from k2cli.server.output.known_formats import TOOL_FORMATS
from k2cli.server.output.output_format import OutputFormat
from k2cli.server.output.parser import _Text
from k2cli.server.text_assembler import Piece
from tests.server.output.families import ANSWERS, TOOLS, Answer
from tests.server.output.parsing import check_order, format_of, pieces_of, run, without_ids

WORDS = [
    "x",
    " ",
    "\n",
    "é",
    "{",
    "}",
    '"',
    "\\",
    "[",
    "]",
    ",",
    ":",
    "<",
    ">",
    "functions.f:1",
    "`",
]
WORDS += ['{"name": "f", "arguments": {"a": "b"}}', "name", '{"a": 1}', "f(a=1)", "=", "|", "null"]


def _marks(parser: str, form: OutputFormat) -> list[str]:
    """Return the markers and tags that the fixtures of a parser have, and parts of them."""
    assert form.tools is not None
    marks = {*form.tools.tokens, *form.tools.opens}
    marks |= set(form.reasoning.tokens if form.reasoning else ())
    for answer in ANSWERS:
        if answer.parser == parser:
            marks |= set(re.findall(r"<[^<>]*>|\[[A-Z_]+\]", answer.output))
    return sorted(marks | {mark[:3] for mark in marks} | {mark[2:] for mark in marks})


def _texts(parser: str, form: OutputFormat, count: int, seed: int) -> Iterator[str]:
    source = random.Random(f"{parser} {seed}")
    marks = _marks(parser, form)
    fixtures = [answer.output for answer in ANSWERS if answer.parser == parser]
    for number in range(count):
        if number % 2:
            text = source.choice(fixtures)
            for _ in range(source.randrange(1, 4)):  # drop, repeat or insert a part
                begin = source.randrange(len(text) + 1)
                end = begin + source.randrange(20)
                part = source.choice(["", text[begin:end] * 2, source.choice(marks + WORDS)])
                text = text[:begin] + part + text[end:]
            yield text
        else:
            parts = source.choices(marks + WORDS, k=source.randrange(1, 25))
            yield "".join(parts)


def _checked(parser: str, count: int, seed: int) -> None:
    for plain in (False, True):
        form = format_of(parser)
        options = OutputOptions(True, TOOLS)
        if plain:
            form = format_of(parser, plain=form.marker_tokens(options).values())
        source = random.Random(seed)
        for text in _texts(parser, form, count, seed):
            some = OutputOptions(True, TOOLS, source.random() < 0.8, source.random() < 0.3)
            tokens = set(form.marker_tokens(some).values())
            events = run(form.parser(some), pieces_of(text, tokens, []))
            check_order(events)
            letters = run(form.parser(some), pieces_of(text, tokens, None))
            assert without_ids(letters) == without_ids(events), text
            cuts = source.sample(range(len(text)), k=min(len(text), 3))
            random_cuts = run(form.parser(some), pieces_of(text, tokens, cuts))
            assert without_ids(random_cuts) == without_ids(events), text


@pytest.mark.parametrize("parser", sorted(TOOL_FORMATS))
def test_generated_answers_never_fail_and_do_not_depend_on_the_split(parser: str) -> None:
    _checked(parser, 60, 1)


@pytest.mark.soak
@pytest.mark.parametrize("parser", sorted(TOOL_FORMATS))
def test_many_generated_answers(parser: str) -> None:
    for seed in range(5):
        _checked(parser, 200, seed)


@pytest.mark.parametrize("parser", ["kimi_k2", "json_tools", "deepseek_v3", "mistral"])
def test_words_are_never_lost(parser: str) -> None:
    """Numbered words between random markers come out once each and in order, wherever they are."""
    form = format_of(parser)
    assert form.tools is not None
    options = OutputOptions(True, TOOLS)
    tokens = set(form.marker_tokens(options).values())
    source = random.Random(5)
    for _ in range(300):
        parts: list[str] = []
        for number in range(source.randrange(1, 30)):
            parts += [*source.choices(sorted(tokens), k=source.randrange(3)), f"w{number} "]
        text = "".join(parts)
        out = ""
        for event in run(form.parser(options), pieces_of(text, tokens, None)):
            match event:
                case AnswerText(text=shown) | ReasoningText(text=shown):
                    out += shown
                case CallArguments(text=shown):
                    out += shown
                case CallBegan(name=name, call_id=call_id):
                    out += f"{name} {call_id if call_id[:1] == 'w' and len(call_id) < 5 else ''} "
        assert re.findall(r"w\d+", out) == re.findall(r"w\d+", text), text


@pytest.mark.parametrize("answer", ANSWERS, ids=lambda answer: answer.name)
def test_the_cost_is_linear(answer: Answer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Letters that are searched, counted: at most a constant number of times each."""
    searched = 0
    add = source_module.Source.add

    def counted(self: source_module.Source, text: str) -> None:
        nonlocal searched
        add(self, text)
        searched += len(self._text)

    monkeypatch.setattr(source_module.Source, "add", counted)
    form = format_of(answer.parser, answer.template)
    options = OutputOptions(True, TOOLS, begins_in_reasoning=answer.inside)
    tokens = form.marker_tokens(options).values()
    costs = []
    for times in (5, 20):
        text = answer.output * times + "x" * len(answer.output) * times
        searched = 0
        run(form.parser(options), pieces_of(text, set(tokens), None))
        costs.append(searched / len(text))
    assert costs[1] < costs[0] * 1.2
    assert costs[1] < 64


def test_a_long_answer_in_one_piece() -> None:
    form = format_of("json_tools", plain=["<tool_call>", "</tool_call>", "<think>", "</think>"])
    parser = form.parser(OutputOptions(True, TOOLS))
    call = '<tool_call>{"name": "f", "arguments": {"a": "' + "x" * 1000 + '"}}</tool_call>'
    events = [*parser.push(Piece(call * 900 + "<" * 200_000)), *parser.finish()]
    assert sum(isinstance(event, CallBegan) for event in events) == 900
    nested = '{"name": "f", "arguments": {"a": ' + "[1, " * 100_000 + "0" + "]" * 100_000 + "}}"
    parser = form.parser(OutputOptions(True, TOOLS))
    events = [*parser.push(Piece(f"<tool_call>{nested}</tool_call>")), *parser.finish()]
    assert [len(e.text) for e in events if isinstance(e, CallArguments)] == [500_008]


class _Spaces(str):
    """Whitespace that counts the letters that are stripped of it, in all texts made of it."""

    stripped = 0

    def __add__(self, other: str) -> _Spaces:
        return _Spaces(str.__add__(self, other))

    def __radd__(self, other: str) -> _Spaces:
        return _Spaces(other + str(self))

    def strip(self, letters: str | None = None) -> str:  # type: ignore[override]
        _Spaces.stripped += len(self)
        return str.strip(self, letters)


@pytest.mark.parametrize("letter", [" ", "\n"])
def test_whitespace_that_is_held_back_is_looked_at_once(letter: str) -> None:
    _Spaces.stripped = 0
    shown: list[str] = []
    text = _Text(
        "answer",
        lambda kind, text, held: shown.append(text),
        lambda text: _Spaces(text),
        trims=True,
        after_marker=False,
    )
    for _ in range(500):
        text.add(letter)
    text.add("x")
    assert "".join(shown) == letter * 500 + "x"
    assert _Spaces.stripped <= 501
