"""Shapes of the answers of an OpenAI API that k2 uses, which may come from any server.

Members that k2 does not use are left out, and null means absent.
"""

from __future__ import annotations

from typing import Annotated, Any

import msgspec

Count = Annotated[int, msgspec.Meta(ge=0, le=2**31)]


class Model(msgspec.Struct, frozen=True):
    """An entry of ``/v1/models``. Only k2's own server is sure to have a context length."""

    id: str
    context_length: Any = None
    owned_by: str | None = None

    @property
    def known_context_length(self) -> int | None:
        """The context length, if it is a number."""
        length = self.context_length
        return length if type(length) is int and 0 < length < 2**31 else None


class Models(msgspec.Struct, frozen=True):
    """The answer of ``/v1/models``."""

    data: tuple[Model, ...] | None = None


class Tokenized(msgspec.Struct, frozen=True):
    """The answer of ``/v1/tokenize``."""

    tokens: list[Count]


class TextDelta(msgspec.Struct, frozen=True):
    """The text that a chunk adds to a message."""

    content: str | None = None


class Choice(msgspec.Struct, frozen=True):
    """A choice of a chunk, of a chat or of a plain completion."""

    text: str | None = None
    delta: TextDelta | None = None
    finish_reason: str | None = None


class ProgressMembers(msgspec.Struct, frozen=True):
    """The ``"k2"`` object of a chunk."""

    queue_position: Count | None = None
    prefill_done: Count | None = None
    prefill_total: Count | None = None
    completion_tokens: Count | None = None


class TokenDetails(msgspec.Struct, frozen=True):
    """Details of the tokens of a prompt."""

    cached_tokens: Count | None = None


class Usage(msgspec.Struct, frozen=True):
    """Tokens that a request used."""

    prompt_tokens: Count | None = None
    completion_tokens: Count | None = None
    prompt_tokens_details: TokenDetails | None = None
    timings: dict[str, Any] | None = None


class Chunk(msgspec.Struct, frozen=True):
    """One event of a stream."""

    choices: tuple[Choice, ...] | None = None
    usage: Usage | None = None
    k2: ProgressMembers | None = None
