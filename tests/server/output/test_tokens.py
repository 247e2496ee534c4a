"""Parsing of the tokens of a real tokenizer: that of a toy of K2, whose markers are tokens."""

from __future__ import annotations

from pathlib import Path

from k2cli.models.text.tokenizer import Tokenizer
from k2cli.protocol import TokenLogprob
from k2cli.server.client_request import OutputOptions
from k2cli.server.output.events import AnswerText, CallBegan, OutputEvent, ReasoningText
from k2cli.server.output.output_format import OutputFormat, choose_output_format
from k2cli.server.text_assembler import TextAssembler
from tests.server.output.families import K2_SECTION, TOOLS, k2_call
from tests.server.output.parsing import joined

CALL = K2_SECTION.format(k2_call("functions.now:0", '{"city": "巴黎"}'))


def _format(folder: Path) -> tuple[Tokenizer, OutputFormat]:
    tokenizer = Tokenizer.load(folder)
    source = tokenizer.template_sources.with_tools
    return tokenizer, choose_output_format(source, {}, tokenizer.token_id)


def _events(folder: Path, ids: list[int], stops: list[str], size: int = 1) -> list[OutputEvent]:
    tokenizer, form = _format(folder)
    options = OutputOptions(True, TOOLS)
    assembler = TextAssembler(tokenizer.stream(), stops, form.marker_tokens(options))
    parser = form.parser(options)
    events: list[OutputEvent] = []
    for at in range(0, len(ids), size):
        group = ids[at : at + size]
        scores = [TokenLogprob(-1.0, [(token, -1.0)]) for token in group]
        events += parser.push(assembler.push(group, scores))
    events += parser.push(assembler.finish())
    return joined([*events, *parser.finish()])


def test_tokens_and_their_scores(toy_k2: Path) -> None:
    tokenizer, form = _format(toy_k2)
    assert form.tools is not None
    assert form.tools.name == "kimi_k2"
    ids = tokenizer.encode("<think>Hm, 巴黎.</think>The capital " + CALL)
    for size in (1, 3, 100):
        reasoning, answer, began, arguments, ended = _events(toy_k2, ids, [], size)
        assert isinstance(reasoning, ReasoningText)
        assert isinstance(answer, AnswerText)
        assert reasoning.text == "Hm, 巴黎."
        assert answer.text == "The capital "
        assert began == CallBegan(0, "functions.now:0", "now")
        assert arguments.text == '{"city": "巴黎"}'  # type: ignore[union-attr]
        assert ended.index == 0  # type: ignore[union-attr]
        for event in (reasoning, answer):
            scored = [score.token for score in event.scores]
            assert tokenizer.decode(scored) == event.text


def test_markers_that_are_spelled_out_are_text(toy_k2: Path) -> None:
    tokenizer = Tokenizer.load(toy_k2)
    text = "<think> and " + CALL
    spelled = [token for letter in text for token in tokenizer.encode(letter)]
    assert tokenizer.decode(spelled) == text
    (answer,) = _events(toy_k2, spelled, [])
    assert isinstance(answer, AnswerText)
    assert answer.text == text
