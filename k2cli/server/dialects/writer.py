"""The interface of a dialect's answers: its stream, and its object for a whole answer."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import msgspec

from k2cli.protocol import PromptProgress
from k2cli.server.engine_request import EngineRequest
from k2cli.server.errors import ApiError
from k2cli.server.generation import Ended, Idle, Step
from k2cli.server.output.events import Blocks

TokenText = Callable[[int], str]


@dataclass(frozen=True, slots=True)
class AnswerContext:
    """Facts about an answer that its writer has before it begins.

    Attributes:
        request: the request, with its prompt.
        model: the model's name, as the client asked for it.
        token_text: returns the text of a token id, for log-probabilities.
        created: seconds since the epoch.
    """

    request: EngineRequest
    model: str
    token_text: TokenText
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def request_id(self) -> str:
        """The engine's id of the request, from which the ids of the answer are made."""
        return self.request.generate.request_id


class AnswerWriter(Protocol):
    """Writer of one answer in one dialect. Methods of the stream return bytes, maybe none."""

    @property
    def keep_alive(self) -> bytes:
        """Bytes for a stream that has been silent for long, which clients skip."""
        ...

    def idle(self, event: Idle) -> bytes:
        """Write that nothing has happened for a while."""
        ...

    def progress(self, event: PromptProgress) -> bytes:
        """Write that a part of the prompt is computed."""
        ...

    def step(self, event: Step) -> bytes:
        """Write new parts of the answer."""
        ...

    def end(self, event: Ended) -> bytes:
        """Write the end of the answer and of the stream."""
        ...

    def error(self, error: ApiError) -> bytes:
        """Write the error that ends a stream."""
        ...

    def whole(self, blocks: Blocks, ended: Ended) -> dict[str, Any]:
        """Return the object of an answer that is not streamed."""
        ...

    def error_object(self, error: ApiError) -> dict[str, Any]:
        """Return the object of an error."""
        ...


SSE_COMMENT = b": waiting\n\n"
"""A comment in a stream of server-sent events, which clients skip."""


class BlankStart:
    """The beginning of a block of text, held back until it has more than white space.

    Blocks of nothing but white space are left out of answers.
    """

    def __init__(self) -> None:
        self._kind = ""
        self._text = ""

    def add(self, kind: str, text: str) -> str:
        """Add text of a kind of block; return all of the block's text once it is not blank."""
        held = self._text if kind == self._kind else ""
        self._kind, self._text = kind, held + text
        if not self._text.strip():
            return ""
        begun, self._text = self._text, ""
        return begun

    def clear(self) -> None:
        """Drop what is held back, because another block begins or goes on."""
        self._text = ""


def sse_data(document: dict[str, Any]) -> bytes:
    """Encode a server-sent event that has no name."""
    return b"data: " + msgspec.json.encode(document) + b"\n\n"


def sse_event(name: str, document: dict[str, Any]) -> bytes:
    """Encode a named server-sent event."""
    return b"event: " + name.encode() + b"\n" + sse_data(document)
