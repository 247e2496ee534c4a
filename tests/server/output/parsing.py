"""Helpers that give an answer's text to a parser, token by token."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from typing import Any

from k2cli.server.conversation import OutputOptions
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
from k2cli.server.output.formats import OutputFormat, choose_output_format
from k2cli.server.text import Marker, Piece
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
        }.get(parser, "think")
    return choose_output_format(template, {}, token_id, parser, reasoning)


def pieces_of(text: str, tokens: Iterable[str], cuts: Sequence[int] | None = None) -> list[Piece]:
    """Cut a text at positions, or into letters; special tokens stay whole and are marked."""
    found = list(re.finditer("|".join(map(re.escape, tokens)), text)) if tokens else []
    inside = {at for marker in found for at in range(marker.start() + 1, marker.end())}
    at = [cut for cut in (range(len(text)) if cuts is None else cuts) if cut not in inside]
    begins = sorted({0, *at})
    ends = [*begins[1:], len(text)]
    return [
        Piece(
            text[begin:end],
            markers=[
                Marker(marker.start() - begin, marker[0])
                for marker in found
                if begin <= marker.start() < end
            ],
            token_offsets=[n for n in range(begin, end) if n not in inside],
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
    result: list[OutputEvent] = []
    for event in events:
        last = result[-1] if result else None
        match event:
            case ReasoningText() | AnswerText() if isinstance(last, type(event)):
                scores = (*last.scores, *event.scores)
                result[-1] = type(event)(last.text + event.text, scores)
            case ReasoningText() | AnswerText():
                result.append(type(event)(event.text, tuple(event.scores)))
            case CallArguments(index=index, text=text) if isinstance(last, CallArguments):
                assert last.index == index
                result[-1] = CallArguments(index, last.text + text)
            case _:
                result.append(event)
    return result


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
