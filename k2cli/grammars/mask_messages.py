"""Messages between the leader rank and its mask process, in the frames of ``protocol.wire``."""

from __future__ import annotations

import msgspec


class Setup(msgspec.Struct, tag=True, frozen=True):
    """The first frame to a mask process: the model, and the most bytes of memory it may take.

    ``rows`` is the number of scores that the model gives for each token, which may be more than
    its tokenizer has tokens.
    """

    folder: str
    rows: int
    memory_bytes: int


class Open(msgspec.Struct, tag=True, frozen=True):
    """Compile a grammar for an answer, read ``prefix``, and send the first mask."""

    answer: int
    grammar: str
    prefix: str
    stop_tokens: list[int]


class Take(msgspec.Struct, tag=True, frozen=True):
    """Add a chosen token to an answer, and send the next mask."""

    answer: int
    token: int


class Close(msgspec.Struct, tag=True, frozen=True):
    """Forget an answer."""

    answer: int


Order = Setup | Open | Take | Close


class Loaded(msgspec.Struct, tag=True, frozen=True):
    """The tokenizer has been read."""


class Mask(msgspec.Struct, tag=True, frozen=True):
    """The tokens that may come next in an answer, stop tokens included.

    Token t is bit ``t % 8`` of byte ``t // 8``; there are whole words of 32 bits.
    """

    answer: int
    bits: bytes


class Complete(msgspec.Struct, tag=True, frozen=True):
    """Nothing may follow: the answer has all that its grammar allows."""

    answer: int


class Refused(msgspec.Struct, tag=True, frozen=True):
    """The grammar of an answer cannot be obeyed, or not any further.

    ``invalid``: by what the request says, and not by a fault.
    """

    answer: int
    error: str
    invalid: bool


News = Loaded | Mask | Complete | Refused
