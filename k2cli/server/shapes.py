"""How an answer looks on the wire: OpenAI's chat and text completion objects, whole and in chunks.

Both routes do the same and differ only in these shapes, so there is one code path for both.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from k2cli.server.text import Piece, ScoredToken

TokenText = Callable[[int], str]


class Shape(Protocol):
    """The objects of one route, for one answer."""

    def whole(
        self, text: str, scores: Sequence[ScoredToken], reason: str, usage: dict[str, Any]
    ) -> dict[str, Any]:
        """The response when not streaming."""
        ...

    def opening(self) -> dict[str, Any] | None:
        """A choice to send before the first text, if the route has such a thing."""
        ...

    def delta(self, piece: Piece) -> dict[str, Any]:
        """A choice that adds text."""
        ...

    def closing(self, reason: str) -> dict[str, Any]:
        """The choice that says why the answer ended."""
        ...

    def chunk(self, choices: list[dict[str, Any]], **members: Any) -> dict[str, Any]:
        """A chunk of a stream around its choices."""
        ...


@dataclass(slots=True)
class _Envelope:
    request_id: str
    model: str
    token_text: TokenText
    scored: bool
    created: int = field(default_factory=lambda: int(time.time()))

    def _object(self, identifier: str, kind: str) -> dict[str, Any]:
        return {"id": identifier, "object": kind, "created": self.created, "model": self.model}


@dataclass(slots=True)
class ChatShape(_Envelope):
    """``/v1/chat/completions``."""

    def whole(
        self, text: str, scores: Sequence[ScoredToken], reason: str, usage: dict[str, Any]
    ) -> dict[str, Any]:
        """A ``chat.completion`` object."""
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": text, "refusal": None},
            "logprobs": self._logprobs(scores),
            "finish_reason": reason,
        }
        envelope = self._object(f"chatcmpl-{self.request_id}", "chat.completion")
        return {**envelope, "choices": [choice], "usage": usage}

    def opening(self) -> dict[str, Any] | None:
        """The chunk that says who speaks."""
        return self._choice({"role": "assistant", "content": ""})

    def delta(self, piece: Piece) -> dict[str, Any]:
        """More text."""
        return self._choice({"content": piece.text}, self._logprobs(piece.scores))

    def closing(self, reason: str) -> dict[str, Any]:
        """The finish reason."""
        return self._choice({}, reason=reason)

    def chunk(self, choices: list[dict[str, Any]], **members: Any) -> dict[str, Any]:
        """A ``chat.completion.chunk`` object."""
        envelope = self._object(f"chatcmpl-{self.request_id}", "chat.completion.chunk")
        return {**envelope, "choices": choices, **members}

    @staticmethod
    def _choice(
        delta: dict[str, Any], logprobs: dict[str, Any] | None = None, reason: str | None = None
    ) -> dict[str, Any]:
        return {"index": 0, "delta": delta, "logprobs": logprobs, "finish_reason": reason}

    def _logprobs(self, scores: Sequence[ScoredToken]) -> dict[str, Any] | None:
        if not self.scored:
            return None
        return {"content": [self._scored(score) for score in scores], "refusal": None}

    def _scored(self, scored: ScoredToken) -> dict[str, Any]:
        top = [self._entry(token, logprob) for token, logprob in scored.score.top]
        return {**self._entry(scored.token, scored.score.logprob), "top_logprobs": top}

    def _entry(self, token: int, logprob: float) -> dict[str, Any]:
        text = self.token_text(token)
        # A token may be a part of a character; its bytes cannot be told from the text then.
        as_bytes = None if "\ufffd" in text else list(text.encode())
        return {"token": text, "logprob": logprob, "bytes": as_bytes}


@dataclass(slots=True)
class CompletionShape(_Envelope):
    """``/v1/completions``."""

    def whole(
        self, text: str, scores: Sequence[ScoredToken], reason: str, usage: dict[str, Any]
    ) -> dict[str, Any]:
        """A ``text_completion`` object."""
        return {**self.chunk([self._choice(text, scores, reason)]), "usage": usage}

    def opening(self) -> dict[str, Any] | None:
        """Plain completions begin with their text."""
        return None

    def delta(self, piece: Piece) -> dict[str, Any]:
        """More text."""
        return self._choice(piece.text, piece.scores, None)

    def closing(self, reason: str) -> dict[str, Any]:
        """The finish reason."""
        return self._choice("", (), reason)

    def chunk(self, choices: list[dict[str, Any]], **members: Any) -> dict[str, Any]:
        """A ``text_completion`` object, which is also the chunk of a stream."""
        envelope = self._object(f"cmpl-{self.request_id}", "text_completion")
        return {**envelope, "choices": choices, **members}

    def _choice(
        self, text: str, scores: Sequence[ScoredToken], reason: str | None
    ) -> dict[str, Any]:
        logprobs = self._logprobs(scores) if self.scored else None
        return {"index": 0, "text": text, "logprobs": logprobs, "finish_reason": reason}

    def _logprobs(self, scores: Sequence[ScoredToken]) -> dict[str, Any]:
        return {
            "tokens": [self.token_text(scored.token) for scored in scores],
            "token_logprobs": [scored.score.logprob for scored in scores],
            "top_logprobs": [
                {self.token_text(token): logprob for token, logprob in scored.score.top}
                for scored in scores
            ],
            "text_offset": [scored.offset for scored in scores],
        }
