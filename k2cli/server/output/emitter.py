"""Writing of events: texts with their scored tokens, and calls with their bounds."""

from __future__ import annotations

import json
import secrets
import string
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import chain, groupby
from typing import Literal

from k2cli.server.output.events import (
    AnswerText,
    CallArguments,
    CallBegan,
    CallEnded,
    OutputEvent,
    ReasoningText,
)
from k2cli.server.output.source import WHITESPACE
from k2cli.server.text_assembler import Piece, ScoredToken

MAX_CALLS = 1000
MAX_NAME_LETTERS = 256

Kind = Literal["answer", "reasoning"]


def common_call_id() -> str:
    """Make an id for a call, in the form of OpenAI's."""
    return f"call_{secrets.token_hex(12)}"


def short_call_id() -> str:
    """Make an id of nine letters and digits, the only form that Mistral's templates accept."""
    return "".join(secrets.choice(string.ascii_letters + string.digits) for _ in range(9))


def _joined(events: list[OutputEvent]) -> list[OutputEvent]:
    """Join neighbouring parts of one text, and of the arguments of one call."""
    result: list[OutputEvent] = []
    for kind, group in groupby(events, key=type):
        parts = list(group)
        if len(parts) == 1 or kind in (CallBegan, CallEnded):
            result += parts
            continue
        text = "".join(part.text for part in parts if not isinstance(part, CallBegan | CallEnded))
        match parts[0]:
            case CallArguments(index=index):
                result.append(CallArguments(index, text))
            case ReasoningText() | AnswerText() as first:
                scored = (part.scores for part in parts if isinstance(part, type(first)))
                result.append(type(first)(text, list(chain.from_iterable(scored))))
    return result


def _sendable(text: str) -> str:
    """Replace lone surrogates, which JSON escapes can make and UTF-8 cannot hold."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode(errors="replace").decode()
    return text


@dataclass(slots=True)
class Emitter:
    """Collector of the events of an answer.

    ``read`` is the number of letters of the answer that were read; texts are given in order.
    """

    make_call_id: Callable[[], str] = common_call_id
    only_first_call: bool = False
    before_call: Callable[[], None] = lambda: None
    calls: int = 0
    reasoning_tokens: int = 0
    closed: bool = False
    _events: list[OutputEvent] = field(default_factory=list)
    _scores: deque[ScoredToken] = field(default_factory=deque)
    _offsets: deque[int] = field(default_factory=deque)
    _open: bool = False
    _empty: bool = True
    _space: str = ""
    _argument_parts: list[str] = field(default_factory=list)

    def add(self, piece: Piece) -> None:
        """Keep the tokens of a piece until their text is emitted."""
        self._scores.extend(piece.scores)
        self._offsets.extend(piece.token_offsets)

    def take_events(self) -> list[OutputEvent]:
        """Return the events since the last call."""
        events, self._events = self._events, []
        return _joined(events)

    # --- texts ---

    def text(self, kind: Kind, text: str, read: int) -> None:
        """Emit a text that ends at an offset of the answer."""
        scores = self._tokens_before(read, kind)
        if self.closed or not (text or scores):
            return
        event = ReasoningText if kind == "reasoning" else AnswerText
        self._events.append(event(text, scores))

    def drop(self, read: int, kind: Kind = "answer") -> None:
        """Drop the tokens of a text that is not emitted."""
        self._tokens_before(read, kind)

    def rest_of_tokens(self, kind: Kind, show: bool) -> None:
        """Emit the scored tokens without text at the end of the answer."""
        last = max([score.offset for score in self._scores] + list(self._offsets), default=0)
        if show and self._scores:
            self.text(kind, "", last + 1)
        self.drop(last + 1, kind)

    def _tokens_before(self, offset: int, kind: Kind) -> list[ScoredToken]:
        scores = []
        while self._scores and self._scores[0].offset < offset:
            scores.append(self._scores.popleft())
        while self._offsets and self._offsets[0] < offset:
            self._offsets.popleft()
            self.reasoning_tokens += kind == "reasoning"
        return scores

    # --- calls ---

    @property
    def full(self) -> bool:
        """True if the answer has as many calls as it may have."""
        return self.calls >= MAX_CALLS

    def begin(self, name: str, call_id: str | None = None) -> bool:
        """Begin a call, unless its name is too long or empty, or there are too many calls."""
        self.end()
        if not 0 < len(name) <= MAX_NAME_LETTERS or self.full:
            return False
        self.before_call()
        if not self.closed:
            call_id = _sendable(call_id or self.make_call_id())
            self._events.append(CallBegan(self.calls, call_id, _sendable(name)))
            self.calls += 1
        self._open, self._empty, self._space = True, True, ""
        self._argument_parts = []
        return True

    def arguments(self, text: str) -> None:
        """Add to the arguments of the open call; whitespace around them is left out."""
        if self._empty:
            text = text.lstrip(WHITESPACE)
        shown = text.rstrip(WHITESPACE)
        if shown:
            self._argument_text(self._space + shown)
            self._empty, self._space = False, ""
        if not self._empty:
            self._space += text[len(shown) :]

    def _argument_text(self, text: str) -> None:
        if self.closed:
            return
        text = _sendable(text)
        self._argument_parts.append(text)
        self._events.append(CallArguments(self.calls - 1, text))

    def end(self) -> None:
        """End the open call, if there is one; a call without arguments gets an empty object."""
        if not self._open:
            return
        if self._empty:
            self._argument_text("{}")
        self._open = False
        if not self.closed:
            self._events.append(CallEnded(self.calls - 1))
            self.closed = self.only_first_call

    def end_if_complete(self) -> None:
        """End the open call if its arguments are an object: its last marker may be missing."""
        if self._open and not self._empty:
            try:
                found = json.loads("".join(self._argument_parts))
            except (ValueError, RecursionError):
                return
            if isinstance(found, dict):
                self.end()
