"""Grammars of calls, compared with our parser, with jsonschema, and with what models write."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Sequence

import jsonschema
import pytest

from k2cli.server.errors import ApiError
from k2cli.server.output.typed_formats import PAIR_FORMATS, TYPED_FORMATS
from k2cli.server.structured.calls import Function
from tests.server.output.families import ANSWERS, TOOLS, Answer
from tests.server.structured.functions import EVERY
from tests.server.structured.sampling import FORMS, Model, grammar, model, read, sample

ONLY_TOKENS = {"pythonic", "llama4_pythonic", "function_gemma", "gemma4"}
WORDS = [
    *(
        "null",
        "true",
        "12",
        "-3.5",
        "1e5",
        " ",
        "\n",
        "a",
        "é巴黎😀",
        "{",
        "}",
        "[",
        "<",
        "\\n",
        '"',
    ),
    *("auto", "fast", "&quot;", "</", "\n\n", "x: y", ",", "</b>", "```", "'", "(", "{}", "\\"),
]


def _snippets(parser: str) -> list[str]:
    """Return words, and the tags that the fixtures of a format have, whole and in part."""
    marks: set[str] = set()
    for answer in ANSWERS:
        if answer.parser == parser:
            marks |= set(re.findall(r"<[^<>]*>|\[[A-Z_]+\]", answer.output))
    return [*WORDS, *sorted(marks | {mark[:-1] for mark in marks})]


_MODES = ((False, False), (True, False), (True, True))
"""Several calls, and after text."""


def _check(
    of: Model,
    functions: Sequence[Function],
    source: random.Random,
    count: int,
    modes: Sequence[tuple[bool, bool]] = _MODES,
) -> int:
    """Compare texts of a grammar with what is read in them. Return the number of calls."""
    calls = 0
    assert of.form.tools is not None
    snippets = _snippets(of.form.tools.name)
    schemas = {each.name: each.parameters or {"type": "object"} for each in functions}
    for several, after_text in modes:
        matcher = of.matcher(grammar(of, functions, several, after_text))
        for _ in range(count):
            ids = sample(of, matcher.deep_copy(), source, snippets, source.randrange(120))
            if ids is None:
                continue
            cuts = [source.randrange(1000) for _ in range(5)]
            found = read(of, ids, functions, cuts)
            shown = "".join(piece.text for piece in of.pieces(ids, []))
            assert after_text or found.text.strip() == "", shown
            assert after_text or found.calls, shown
            assert several or len(found.calls) == 1, shown
            for call in found.calls:
                arguments = json.loads(call.arguments)
                assert isinstance(arguments, dict), shown
                jsonschema.Draft202012Validator(schemas[call.name]).validate(arguments)
                assert call.complete, shown
            calls += len(found.calls)
    return calls


@pytest.mark.parametrize("plain", [False, True], ids=["tokens", "text"])
@pytest.mark.parametrize("parser", FORMS)
def test_what_a_grammar_allows_is_read_as_calls_that_obey(parser: str, plain: bool) -> None:
    if plain and parser in ONLY_TOKENS:
        with pytest.raises(ApiError, match=f"{parser}.*has no token"):
            grammar(model(parser, plain), EVERY, True, False)
        return
    assert _check_all(model(parser, plain), random.Random(parser), 3) > 40


@pytest.mark.soak
@pytest.mark.parametrize("plain", [False, True], ids=["tokens", "text"])
@pytest.mark.parametrize("parser", FORMS)
def test_much_that_grammars_allow(parser: str, plain: bool) -> None:
    if not (plain and parser in ONLY_TOKENS):
        for seed in range(10):
            _check_all(model(parser, plain), random.Random(seed), 20)


def _check_all(of: Model, source: random.Random, count: int) -> int:
    functions = [each for each in EVERY if _is_possible(of, each)]
    assert of.form.tools is not None
    if of.form.tools.name == "function_gemma":
        assert len(functions) > 4
    else:
        assert functions == list(EVERY)
    calls = _check(of, functions, source, 4 * count)
    for each in functions:
        calls += _check(of, [each], source, count, [(source.random() < 0.5, False)])
    return calls


def _is_possible(of: Model, function: Function) -> bool:
    try:
        grammar(of, [function], False, False)
    except ApiError:
        return False
    return True


def _calls_of(answer: Answer, of: Model) -> str:
    """Return the part of an answer that is calls."""
    assert of.form.tools is not None
    if answer.parser == "harmony":
        after = answer.output.partition("<|start|>assistant<|channel|>commentary to=")[2]
        return f"<|channel|>commentary to={after.rpartition('<|start|>')[0]}"
    if answer.parser == "kimi_k3":
        begin = answer.output.index("<|open|>tools")
        return answer.output[begin:].removesuffix("<|close|>message<|sep|>")
    begins = [answer.output.find(marker) for marker in of.form.tools.opens]
    begin = min([begin for begin in begins if begin >= 0], default=0)
    if answer.parser in ("mistral", "llama3_json", "llama4_pythonic"):
        return answer.output[begin:]
    typed, pairs = TYPED_FORMATS.get(answer.parser), PAIR_FORMATS.get(answer.parser)
    closing = of.form.tools.tokens
    if typed is not None:
        closing = (typed.section_end or typed.call_end,)
    if pairs is not None:
        closing = (pairs.section_end,)
    end = max(answer.output.rfind(mark) + len(mark) for mark in closing)
    assert end > begin + 20
    return answer.output[begin:end]


def _functions(answer: Answer) -> list[Function]:
    """Return the tools of the fixtures, with parameters in the order of an answer's arguments."""
    order = [key for call in answer.calls for key in call.arguments]
    found = []
    for tool in TOOLS:
        schema = tool["function"]["parameters"]
        keys = sorted(schema["properties"], key=lambda key: order.index(key) if key in order else 9)
        properties = {key: schema["properties"][key] for key in keys}
        # FunctionGemma writes no objects, which one of the tools has.
        strict = answer.parser != "function_gemma"
        found.append(
            Function(tool["function"]["name"], {**schema, "properties": properties}, strict)
        )
    return found


@pytest.mark.parametrize("plain", [False, True], ids=["tokens", "text"])
@pytest.mark.parametrize(
    "answer",
    [answer for answer in ANSWERS if answer.parser in FORMS],
    ids=lambda answer: answer.name,
)
def test_what_models_write_is_allowed(answer: Answer, plain: bool) -> None:
    if plain and answer.parser in ONLY_TOKENS:
        pytest.skip("refused")
    if plain and answer.name == "Mistral":
        pytest.skip("without the token [ARGS], models write lists")
    of = model(answer.parser, plain, without=("[ARGS]",) if answer.name == "Mistral 7B" else ())
    written, functions = _calls_of(answer, of), _functions(answer)
    for several in (True, False):
        matcher = of.matcher(grammar(of, functions, several, False))
        ids = of.ids(written)
        count = matcher.try_consume_tokens(ids)
        if several or len(answer.calls) == 1:
            assert count == len(ids), written[count:]
            assert matcher.is_accepting()
        else:
            assert count < len(ids)
    matcher = of.matcher(grammar(of, functions, True, True))
    ids = of.ids(written)
    assert matcher.try_consume_tokens(ids) == len(ids)
    assert matcher.is_accepting()
