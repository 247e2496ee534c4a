"""Harmony, the format of gpt-oss: an answer is a row of messages, each with a header.

A header names a channel and maybe a recipient: ``<|channel|>analysis<|message|>`` is reasoning,
``<|channel|>commentary to=functions.NAME <|constrain|>json<|message|>`` is a call, and the rest is
the answer. The prompt ends with ``<|start|>assistant``, so that an answer begins within a header.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Generator
from dataclasses import dataclass

from k2cli.server.output.emitter import MAX_NAME_LETTERS, Emitter, Kind
from k2cli.server.output.json_calls import until_after_json
from k2cli.server.output.source import Reading, Source, TooLong

NAME = "harmony"
BODY = "<|message|>"
STARTS = ("<|start|>", "<|channel|>")
ENDS = ("<|end|>", "<|return|>", "<|call|>")
TOKENS = (*STARTS, *ENDS, BODY, "<|constrain|>")

_MAX_HEADER_LETTERS = 2 * MAX_NAME_LETTERS
_RECIPIENT_BEGIN = "t"
_RECIPIENT = re.compile(r"\bto=([^\s<]+)")
_CHANNEL = re.compile(r"<\|channel\|>\s*(\w+)")


@dataclass(frozen=True, slots=True)
class MessageWriter:
    """The things that reading messages uses.

    Attributes:
        switch: begins text of a kind, and is told the offset at which the last one ended.
        text: adds to the text.
        reasoning: the kind of text that reasoning becomes.
        with_calls: True if messages to functions are calls.
    """

    emitter: Emitter
    switch: Callable[[Kind, int], None]
    text: Callable[[str], None]
    reasoning: Kind
    with_calls: bool


def read_messages(source: Source, writer: MessageWriter) -> Reading:
    """Read all messages of an answer. Text outside of messages is added to the text before it."""
    starts, ends = (tuple(map(source.codes.encode, texts)) for texts in (STARTS, ENDS))
    before, found = yield from _first_header(source, writer, starts, ends)
    while found is not None:
        if found in starts:
            found = yield from _message(source, writer, before + found, starts, ends)
            before = ""
        else:
            found = yield from _until(source, (*starts, *ends), writer.text)


def _first_header(
    source: Source, writer: MessageWriter, starts: tuple[str, ...], ends: tuple[str, ...]
) -> Generator[None, None, tuple[str, str | None]]:
    """Read a recipient with which an answer may begin, since its prompt ends within a header.

    Return the recipient and the marker after it; other text is added to the answer.
    """
    parts: list[str] = []
    if (yield from source.skip(" ", parts.append)) != _RECIPIENT_BEGIN:
        writer.text("".join(parts))
        return "", ""
    found = yield from source.until((*starts, *ends), parts.append, limit=_MAX_HEADER_LETTERS)
    text = "".join(parts)
    if found in starts and _RECIPIENT.fullmatch(text.strip()):
        assert isinstance(found, str)
        return text, found
    writer.text(text)
    return "", "" if isinstance(found, TooLong) else found


def _message(
    source: Source,
    writer: MessageWriter,
    start: str,
    starts: tuple[str, ...],
    ends: tuple[str, ...],
) -> Generator[None, None, str | None]:
    """Read a message after the marker that began it. Return the marker that ended it, if any."""
    begin = source.offset - len(source.codes.decode(start))
    header: list[str] = []
    body = source.codes.encode(BODY)
    found = yield from source.until((body, *ends), header.append, limit=_MAX_HEADER_LETTERS)
    text = source.codes.decode(start) + "".join(header)
    if found != body:
        if isinstance(found, TooLong):
            writer.text("".join(header))
            return ""
        return found  # a header without a message
    recipient, channel = _RECIPIENT.search(text), _CHANNEL.search(text)
    name = recipient[1] if recipient else ""
    if writer.with_calls and name.startswith("functions."):
        writer.switch("answer", begin)
        if writer.emitter.begin(name.removeprefix("functions.")):
            found = yield from until_after_json(source, (*starts, *ends), writer.emitter.arguments)
            if found is not None:
                writer.emitter.end()
            writer.emitter.end_if_complete()
            return found if isinstance(found, str) else None
    reasoning = name or (channel is not None and channel[1] == "analysis")
    writer.switch(writer.reasoning if reasoning else "answer", begin)
    return (yield from _until(source, (*starts, *ends), writer.text))


def _until(
    source: Source, markers: tuple[str, ...], take: Callable[[str], None]
) -> Generator[None, None, str | None]:
    found = yield from source.until(markers, take, coded=True)
    return found if isinstance(found, str) else None
