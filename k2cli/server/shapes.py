"""The JSON of an answer: OpenAI's chat and text completion objects, whole and in chunks.

The two routes differ only in these shapes, so ``respond`` is one code path for both.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from k2cli.server.text import Piece, ScoredToken

TokenText = Callable[[int], str]


class Shape(Protocol):
    """The JSON objects of one answer on one route."""

    def whole(
        self, text: str, scores: Sequence[ScoredToken], reason: str, usage: dict[str, Any]
    ) -> dict[str, Any]:
        """Return the response without streaming."""
        ...

    def opening(self) -> dict[str, Any] | None:
        """Return the choice to send before the first text, or None."""
        ...

    def delta(self, piece: Piece) -> dict[str, Any]:
        """Return a choice that adds text."""
        ...

    def closing(self, reason: str) -> dict[str, Any]:
        """Return the choice with the finish reason."""
        ...

    def chunk(self, choices: list[dict[str, Any]], **members: Any) -> dict[str, Any]:
        """Return a chunk of a stream with these choices."""
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
    """The objects of ``/v1/chat/completions``."""

    def whole(
        self, text: str, scores: Sequence[ScoredToken], reason: str, usage: dict[str, Any]
    ) -> dict[str, Any]:
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": text, "refusal": None},
            "logprobs": self._logprobs(scores),
            "finish_reason": reason,
        }
        envelope = self._object(f"chatcmpl-{self.request_id}", "chat.completion")
        return {**envelope, "choices": [choice], "usage": usage}

    def opening(self) -> dict[str, Any] | None:
        return self._choice({"role": "assistant", "content": ""})

    def delta(self, piece: Piece) -> dict[str, Any]:
        return self._choice({"content": piece.text}, self._logprobs(piece.scores))

    def closing(self, reason: str) -> dict[str, Any]:
        return self._choice({}, reason=reason)

    def chunk(self, choices: list[dict[str, Any]], **members: Any) -> dict[str, Any]:
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
        # If a token is a part of a character, its bytes cannot be derived from the text.
        as_bytes = None if "\ufffd" in text else list(text.encode())
        return {"token": text, "logprob": logprob, "bytes": as_bytes}


@dataclass(slots=True)
class CompletionShape(_Envelope):
    """The objects of ``/v1/completions``."""

    def whole(
        self, text: str, scores: Sequence[ScoredToken], reason: str, usage: dict[str, Any]
    ) -> dict[str, Any]:
        return {**self.chunk([self._choice(text, scores, reason)]), "usage": usage}

    def opening(self) -> dict[str, Any] | None:
        return None

    def delta(self, piece: Piece) -> dict[str, Any]:
        return self._choice(piece.text, piece.scores, None)

    def closing(self, reason: str) -> dict[str, Any]:
        return self._choice("", (), reason)

    def chunk(self, choices: list[dict[str, Any]], **members: Any) -> dict[str, Any]:
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
