"""Streams of OpenAI's chat completions and completions.

A stream consists of chunks with text, one with the finish reason, one with the usage if asked for,
and ``[DONE]``. With ``include_progress`` it also has ``"k2"`` objects: the position in the queue,
the prompt tokens computed, and the number of tokens generated, which comes with every step even
while text is held back. An error after the headers are sent is a chunk with ``error``, and the
stream ends without ``[DONE]``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from k2cli.protocol import PromptProgress
from k2cli.server.dialects.writer import SSE_COMMENT, AnswerContext, sse_data
from k2cli.server.errors import ApiError
from k2cli.server.generation import Ended, Idle, Step
from k2cli.server.output.events import OutputEvent
from k2cli.server.usage import AnswerUsage, timings

_DONE = b"data: [DONE]\n\n"


class OpenAIWriter(ABC):
    """The part that OpenAI's two older routes share; subclasses know the objects."""

    keep_alive = SSE_COMMENT

    def __init__(self, context: AnswerContext) -> None:
        self.context = context
        self.scored = context.request.generate.sampling.top_logprobs is not None
        self._opened = False
        self._position: int | None = None

    @abstractmethod
    def opening(self, first: OutputEvent | None) -> dict[str, Any] | None:
        """Return the choice to send before the first part of the answer, or None."""

    @abstractmethod
    def delta(self, event: OutputEvent) -> dict[str, Any] | None:
        """Return a choice that adds a part of the answer, or None for one that shows nothing."""

    @abstractmethod
    def closing(self, reason: str) -> dict[str, Any]:
        """Return the choice with the finish reason."""

    @abstractmethod
    def chunk(self, choices: list[dict[str, Any]], **members: Any) -> dict[str, Any]:
        """Return a chunk of a stream with these choices."""

    def envelope(self, identifier: str, kind: str) -> dict[str, Any]:
        """Return the members that all objects have."""
        made = {"created": self.context.created, "model": self.context.model}
        return {"id": f"{identifier}-{self.context.request_id}", "object": kind, **made}

    def _event(self, choices: list[dict[str, Any]], **members: Any) -> bytes:
        if self.context.request.wants_usage:
            members.setdefault("usage", None)
        return sse_data(self.chunk(choices, **members))

    def idle(self, event: Idle) -> bytes:
        if self.context.request.wants_progress and event.queue_position != self._position:
            self._position = event.queue_position
            if event.queue_position is not None:
                return self._event([], k2={"queue_position": event.queue_position})
        return b""

    def progress(self, event: PromptProgress) -> bytes:
        if not self.context.request.wants_progress:
            return b""
        done = {
            "prefill_done": event.done,
            "prefill_total": event.total,
            "cached_tokens": event.cached,
        }
        return self._event([], k2=done)

    def _open(self, first: OutputEvent | None = None) -> bytes:
        if self._opened:
            return b""
        self._opened = True
        opening = self.opening(first)
        return self._event([opening]) if opening else b""

    def step(self, event: Step) -> bytes:
        parts = [(part, delta) for part in event.events if (delta := self.delta(part)) is not None]
        deltas = [delta for _, delta in parts]
        progress = self.context.request.wants_progress
        if not progress and not deltas:
            return b""
        members: dict[str, Any] = {}
        if progress:
            members["k2"] = {"completion_tokens": event.completion_tokens}
        # One part per chunk: clients read only the first choice of each index.
        written = [self._event([delta]) for delta in deltas[:-1]]
        opening = self._open(parts[0][0]) if parts else b""
        return opening + b"".join(written) + self._event(deltas[-1:], **members)

    def end(self, event: Ended) -> bytes:
        data = self._open() + self._event([self.closing(event.finish_reason)])
        if self.context.request.wants_usage:
            data += self._event([], usage=openai_usage(event.usage))
        return data + _DONE

    def error(self, error: ApiError) -> bytes:
        return sse_data(error.body())

    def error_object(self, error: ApiError) -> dict[str, Any]:
        return error.body()


def openai_usage(used: AnswerUsage) -> dict[str, Any]:
    """Make OpenAI's usage object of a chat completion or a completion."""
    members: dict[str, Any] = {
        "prompt_tokens": used.prompt_tokens,
        "completion_tokens": used.completion_tokens,
        "total_tokens": used.prompt_tokens + used.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": used.cached_tokens},
        "completion_tokens_details": {
            "reasoning_tokens": used.reasoning_tokens,
            "accepted_prediction_tokens": used.accepted_tokens,
            "rejected_prediction_tokens": used.draft_tokens - used.accepted_tokens,
        },
    }
    if used.max_tokens is not None:
        members["max_tokens"] = used.max_tokens
    if used.finished is not None:
        members["timings"] = timings(used.finished)
    return members
