"""Helpers that give an answer's text to a parser, token by token."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterable, Sequence
from typing import Any

from k2cli.server.client_request import OutputOptions
from k2cli.server.output.events import (
    AnswerText,
    Blocks,
    CallArguments,
    CallBegan,
    CallBlock,
    CallEnded,
    OutputEvent,
    OutputParser,
    ReasoningText,
)
from k2cli.server.output.output_format import OutputFormat, choose_output_format
from k2cli.server.text_assembler import Marker, Piece
from tests.server.output.families import TOOLS, Answer


def format_of(
    parser: str, template: str = "", plain: Iterable[str] = (), reasoning: str | None = None
) -> OutputFormat:
    """Choose a format for a model whose vocabulary has all markers as tokens but ``plain``."""
    ids: dict[str, int] = {}

    def token_id(text: str) -> int | None:
        return None if text in set(plain) else ids.setdefault(text, len(ids))

    if reasoning is None:
        reasoning = {
            "kimi_k3": "kimi_k3",
            "gemma4": "gemma4",
            "longcat": "longcat",
            "mistral": "mistral",
            "harmony": "harmony",
        }.get(parser, "think")
    return choose_output_format(template, {}, token_id, parser, reasoning)


def pieces_of(text: str, tokens: Iterable[str], cuts: Sequence[int] | None = None) -> list[Piece]:
    """Cut a text at positions, or into letters; special tokens stay whole and are marked."""
    found = list(re.finditer("|".join(map(re.escape, tokens)), text)) if tokens else []
    inside = {at for marker in found for at in range(marker.start() + 1, marker.end())}
    texts = {marker.start(): marker[0] for marker in found}
    at = [cut for cut in (range(len(text)) if cuts is None else cuts) if cut not in inside]
    begins = sorted({0, *at})
    ends = [*begins[1:], len(text)]
    return [
        Piece(
            text[begin:end],
            markers=[Marker(at - begin, texts[at]) for at in range(begin, end) if at in texts],
            token_offsets=[at for at in range(begin, end) if at not in inside],
        )
        for begin, end in zip(begins, ends, strict=True)
    ]


def run(parser: OutputParser, pieces: Iterable[Piece]) -> list[OutputEvent]:
    """Return all events of an answer, neighbouring deltas joined."""
    events: list[OutputEvent] = []
    for piece in pieces:
        events += parser.push(piece)
    return joined([*events, *parser.finish()])


def joined(events: Iterable[OutputEvent]) -> list[OutputEvent]:
    """Join neighbouring texts of the same kind, and their scores."""
    result: list[OutputEvent] = []
    for _, group in itertools.groupby(events, key=_kind):
        first, *others = group
        all_of_them: list[Any] = [first, *others]
        text = "".join(getattr(event, "text", "") for event in all_of_them)
        match first:
            case ReasoningText() | AnswerText():
                scores = [score for event in all_of_them for score in event.scores]
                result.append(type(first)(text, tuple(scores)))
            case CallArguments(index=index):
                result.append(CallArguments(index, text))
            case _:
                result += all_of_them
    return result


def _kind(event: OutputEvent) -> object:
    return type(event), getattr(event, "index", None)


def without_ids(events: Iterable[OutputEvent]) -> list[OutputEvent]:
    """Replace ids that differ from run to run."""
    return [
        CallBegan(event.index, "", event.name)
        if isinstance(event, CallBegan) and not event.call_id.startswith("functions.")
        else event
        for event in events
    ]


def check_order(events: Iterable[OutputEvent]) -> None:
    """Check that calls follow each other, and that no text stands within one."""
    open_call: int | None = None
    next_call = 0
    for event in events:
        match event:
            case CallBegan(index=index):
                assert index == next_call
                next_call, open_call = next_call + 1, index
            case CallArguments(index=index):
                assert open_call == index
            case CallEnded(index=index):
                assert open_call == index
                open_call = None
            case _:
                assert open_call is None


def parse(
    parser: str,
    text: str,
    *,
    template: str = "",
    plain: Iterable[str] = (),
    inside: bool = False,
    tools: list[dict[str, Any]] | None = TOOLS,
    parallel: bool = True,
    cuts: Sequence[int] | None = None,
    reasoning: str | None = None,
) -> Blocks:
    """Parse an answer of one format."""
    form = format_of(parser, template, plain, reasoning)
    options = OutputOptions(True, tools, parallel, inside)
    tokens = set(form.marker_tokens(options).values())
    events = run(form.parser(options), pieces_of(text, tokens, cuts))
    check_order(events)
    blocks = Blocks()
    blocks.add(events)
    return blocks


def parse_answer(answer: Answer, cuts: Sequence[int] | None = None) -> Blocks:
    return parse(
        answer.parser,
        answer.output,
        template=answer.template,
        plain=answer.plain,
        inside=answer.inside,
        cuts=cuts,
    )


def value(call: CallBlock) -> Any:
    return json.loads(call.arguments)
