"""Conversion of token ids to the text of an answer: detokenizing and stop strings.

Text is sent only once it is certain. The tokenizer's stream holds back bytes that are not yet a
whole character. This module holds back a tail that could be the beginning of a stop string, until
the next tokens decide. Nothing here does I/O.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from k2cli.protocol import TokenLogprob


class TokenTextStream(Protocol):
    """The detokenizer of one answer (``models.text.tokenizer.TokenStream``)."""

    def push(self, token_id: int, /) -> str:
        """Add a token and return the text that is now certain, which may be empty."""
        ...

    def finish(self) -> str:
        """Return the text that was still held back."""
        ...


@dataclass(frozen=True, slots=True)
class ScoredToken:
    """A generated token with its log-probability and the offset of its text."""

    token: int
    offset: int
    score: TokenLogprob


@dataclass(frozen=True, slots=True)
class Piece:
    """Text that is certain, and its scored tokens, if asked for."""

    text: str = ""
    scores: Sequence[ScoredToken] = ()


def held_back(text: str, stops: Sequence[str]) -> int:
    """Compute the length of the longest tail of ``text`` that begins a stop string."""
    longest = max((len(stop) for stop in stops), default=0)
    for length in range(min(longest - 1, len(text)), 0, -1):
        tail = text[-length:]
        if any(stop.startswith(tail) for stop in stops):
            return length
    return 0


def first_stop(text: str, stops: Sequence[str]) -> int | None:
    """Find the position of the first stop string in ``text``."""
    found = [position for stop in stops if (position := text.find(stop)) >= 0]
    return min(found, default=None)


@dataclass(slots=True)
class TextAssembler:
    """The text of one answer. Push tokens and send the returned text, until ``stopped``.

    ``tokens_used`` counts the tokens up to and including the one that completed a stop string,
    which is ``stop_string`` then.
    """

    stream: TokenTextStream
    stops: Sequence[str] = ()
    stopped: bool = False
    stop_string: str | None = None
    tokens_used: int = 0
    _pending: str = ""
    _received: int = 0
    _scores: list[ScoredToken] = field(default_factory=list)

    def push(self, tokens: Sequence[int], logprobs: Sequence[TokenLogprob] = ()) -> Piece:
        """Add newly generated tokens and return the text that is now certain.

        Tokens after a completed stop string are dropped, here and in later calls.
        """
        for index, token in enumerate(tokens):
            if self.stopped:
                break
            self.tokens_used += 1
            if logprobs:
                self._scores.append(ScoredToken(token, self._received, logprobs[index]))
            self._append(self.stream.push(token))
        return self._release(len(self._pending) - held_back(self._pending, self.stops))

    def finish(self) -> Piece:
        """Return the remaining text once the engine has ended the answer."""
        if not self.stopped:
            self._append(self.stream.finish())
        piece = self._release(len(self._pending))
        if not self.stopped and self._scores:
            rest, self._scores = self._scores, []
            piece = Piece(piece.text, [*piece.scores, *rest])
        return piece

    def _append(self, text: str) -> None:
        if not text:
            return
        self._received += len(text)
        self._pending += text
        if (cut := first_stop(self._pending, self.stops)) is not None:
            self.stop_string = next(
                stop for stop in self.stops if self._pending.startswith(stop, cut)
            )
            self._received -= len(self._pending) - cut
            self._pending = self._pending[:cut]
            self.stopped = True

    def _release(self, length: int) -> Piece:
        if self.stopped:
            length = len(self._pending)
        text, self._pending = self._pending[:length], self._pending[length:]
        sent_up_to = self._received - len(self._pending)
        scores = [score for score in self._scores if score.offset < sent_up_to]
        self._scores = [score for score in self._scores if score.offset >= sent_up_to]
        return Piece(text, scores)
