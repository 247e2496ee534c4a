from __future__ import annotations

import pytest

from k2cli.server.client_request import OutputOptions
from k2cli.server.output.mlx_lm_calls import parse_whole
from tests.server.output.families import ANSWERS, TOOLS, Answer
from tests.server.output.parsing import (
    format_of,
    parse_answer,
    pieces_of,
    run,
    value,
    without_ids,
)

MLX_LM = {"laguna", "longcat", "glm47"}


@pytest.mark.parametrize("answer", ANSWERS, ids=lambda answer: answer.name)
def test_parts_of_an_answer(answer: Answer) -> None:
    found = parse_answer(answer)
    assert found.text == answer.text
    assert found.reasoning == answer.reasoning
    assert [(call.name, value(call), call.complete) for call in found.calls] == [
        (call.name, call.arguments, True) for call in answer.calls
    ]
    for call, wanted in zip(found.calls, answer.calls, strict=True):
        assert call.call_id == wanted.call_id or wanted.call_id is None
    assert len({call.call_id for call in found.calls}) == len(found.calls)


@pytest.mark.parametrize(
    "answer", [answer for answer in ANSWERS if answer.oracle], ids=lambda answer: answer.name
)
def test_calls_agree_with_mlx_lm(answer: Answer) -> None:
    whole = [
        (call["name"], call["arguments"])
        for text in answer.oracle
        for call in parse_whole(answer.parser, text, TOOLS)
    ]
    assert whole
    found = [(call.name, value(call)) for call in parse_answer(answer).calls]
    assert found == whole


@pytest.mark.parametrize("plain", [False, True], ids=["tokens", "text"])
@pytest.mark.parametrize("answer", ANSWERS, ids=lambda answer: answer.name)
def test_every_split_gives_the_same_events(answer: Answer, plain: bool) -> None:
    form = format_of(answer.parser, answer.template)
    options = OutputOptions(True, TOOLS, begins_in_reasoning=answer.inside)
    if plain:
        texts = form.marker_tokens(options).values()
        form = format_of(answer.parser, answer.template, texts)
    tokens = set(form.marker_tokens(options).values())
    whole = without_ids(run(form.parser(options), pieces_of(answer.output, tokens, [])))
    cuts = [[cut] for cut in range(len(answer.output))]
    for at in [None, *cuts]:
        assert without_ids(run(form.parser(options), pieces_of(answer.output, tokens, at))) == whole
