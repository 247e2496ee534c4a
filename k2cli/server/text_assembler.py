"""Conversion of token ids to the text of an answer: detokenizing and stop strings.

Text is sent only once it is certain. The tokenizer's stream holds back bytes that are not yet a
whole character. This module holds back a tail that could be the beginning of a stop string, until
the next tokens decide. Nothing here does I/O.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from k2cli.protocol import TokenLogprob


class TokenTextStream(Protocol):
    """The detokenizer of one answer (``models.text.token_stream.TokenStream``)."""

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
class Marker:
    """A special token of the model, such as ``<think>``, at an offset of a text.

    Ordinary tokens with the same text are none.
    """

    offset: int
    text: str


@dataclass(frozen=True, slots=True)
class Piece:
    """Text that is certain, and what is known of its tokens.

    Attributes:
        text: the text, including that of markers.
        scores: the scored tokens, if asked for.
        markers: the markers in the text, with offsets in it. Only tokens that the assembler was
            told about are marked.
        token_offsets: where the text of each token begins, counted from the answer's beginning.
    """

    text: str = ""
    scores: Sequence[ScoredToken] = ()
    markers: Sequence[Marker] = ()
    token_offsets: Sequence[int] = ()


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
    which is ``stop_string`` then. ``marker_tokens`` are the texts of tokens that are markers; their
    text is part of the answer's even if the stream leaves out special tokens.
    """

    stream: TokenTextStream
    stops: Sequence[str] = ()
    marker_tokens: Mapping[int, str] = field(default_factory=dict)
    stopped: bool = False
    stop_string: str | None = None
    tokens_used: int = 0
    _pending: str = ""
    _received: int = 0
    _scores: list[ScoredToken] = field(default_factory=list)
    _offsets: list[int] = field(default_factory=list)
    _markers: list[Marker] = field(default_factory=list)

    def push(self, tokens: Sequence[int], logprobs: Sequence[TokenLogprob] = ()) -> Piece:
        """Add newly generated tokens and return the text that is now certain.

        Tokens after a completed stop string are dropped, here and in later calls.
        """
        for index, token in enumerate(tokens):
            if self.stopped:
                break
            self.tokens_used += 1
            self._offsets.append(self._received)
            if logprobs:
                self._scores.append(ScoredToken(token, self._received, logprobs[index]))
            text = self.stream.push(token)
            marker = self.marker_tokens.get(token)
            if marker is None:
                self._append(text)
                continue
            self._append(text.removesuffix(marker))
            if not self.stopped:
                self._markers.append(Marker(self._received, marker))
                self._append(marker)
        return self._release(len(self._pending) - held_back(self._pending, self.stops))

    def finish(self) -> Piece:
        """Return the remaining text once the engine has ended the answer."""
        if not self.stopped:
            self._append(self.stream.finish())
        piece = self._release(len(self._pending))
        if not self.stopped:
            scores, self._scores = [*piece.scores, *self._scores], []
            offsets, self._offsets = [*piece.token_offsets, *self._offsets], []
            piece = Piece(piece.text, scores, piece.markers, offsets)
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
            cut = self._before_marker(cut)
            self._received -= len(self._pending) - cut
            self._pending = self._pending[:cut]
            self.stopped = True

    def _before_marker(self, length: int) -> int:
        """Shorten a part of the pending text that would end within a marker."""
        sent = self._received - len(self._pending)
        for marker in reversed(self._markers):
            begin = marker.offset - sent
            if begin < length < begin + len(marker.text):
                return begin
        return length

    def _release(self, length: int) -> Piece:
        length = len(self._pending) if self.stopped else self._before_marker(length)
        sent = self._received - len(self._pending)
        text, self._pending = self._pending[:length], self._pending[length:]
        up_to = sent + length
        scores = [score for score in self._scores if score.offset < up_to]
        self._scores = self._scores[len(scores) :]
        offsets = [offset for offset in self._offsets if offset < up_to]
        self._offsets = self._offsets[len(offsets) :]
        markers = [marker for marker in self._markers if marker.offset < up_to]
        self._markers = self._markers[len(markers) :]
        markers = [Marker(marker.offset - sent, marker.text) for marker in markers]
        return Piece(text, scores, markers, offsets)
