"""A conversation: its turns, the answer that is being streamed, and what it cost.

An answer that is broken off, by the user or by a lost server, stays in the conversation as far as
it came, so that the next question can refer to it.
"""

from __future__ import annotations

import time
from collections.abc import Generator
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any, Protocol

from k2cli.client.client import (
    Delta,
    Ended,
    GenerationOptions,
    ModelInfo,
    StreamEvent,
)
from k2cli.errors import K2Error


class ChatApi(Protocol):
    """What a session needs of ``ApiClient``."""

    def chat(
        self, model: ModelInfo, messages: list[dict[str, str]], options: GenerationOptions
    ) -> Generator[StreamEvent]:
        """Stream an answer."""
        ...


@dataclass(slots=True)
class Answer:
    """One answer as it grows. ``finish_reason`` stays None if it is broken off.

    ``first_text_seconds`` (time to first token) is the client's own clock; ``usage`` the server's.
    """

    text: str = ""
    finish_reason: str | None = None
    usage: dict[str, Any] = field(default_factory=dict)
    first_text_seconds: float | None = None
    total_seconds: float = 0.0

    @property
    def timings(self) -> dict[str, Any] | None:
        """The server's timings, if it is one that sends them."""
        times = self.usage.get("timings")
        return times if isinstance(times, dict) else None

    @property
    def tokens_per_second(self) -> float | None:
        """Speed of generation: by the server's clock, or else from first text to end by ours."""
        if self.timings is not None:
            rate = self.timings.get("decode_tokens_per_second")
            return float(rate) if rate is not None else None
        tokens = self.usage.get("completion_tokens")
        if tokens is None or self.first_text_seconds is None:
            return None
        seconds = self.total_seconds - self.first_text_seconds
        return (tokens - 1) / seconds if seconds > 0 and tokens > 1 else None


@dataclass(slots=True)
class ChatSession:
    """A conversation with one model."""

    api: ChatApi
    model: ModelInfo
    options: GenerationOptions = field(default_factory=GenerationOptions)
    system: str | None = None
    turns: list[dict[str, str]] = field(default_factory=list)
    answer: Answer | None = None

    def messages(self) -> list[dict[str, str]]:
        """The conversation as the API takes it."""
        first = [{"role": "system", "content": self.system}] if self.system else []
        return first + self.turns

    def clear(self) -> None:
        """Forget all turns, but not the system prompt."""
        self.turns = []
        self.answer = None

    def ask(self, question: str) -> Generator[StreamEvent]:
        """Put a question and stream its answer, which is in ``answer`` as far as it came.

        Close the generator to stop the answer, here and on the server.

        Raises:
            K2Error: if the server refuses or is lost.
        """
        self.turns.append({"role": "user", "content": question})
        return self._stream()

    def regenerate(self) -> Generator[StreamEvent]:
        """Answer the last question again, in place of the answer that it had.

        Raises:
            K2Error: if there was no question, or the server refuses or is lost.
        """
        if self.turns and self.turns[-1]["role"] == "assistant":
            self.turns.pop()
        if not self.turns:
            raise K2Error("there is no question yet to answer again")
        return self._stream()

    def _stream(self) -> Generator[StreamEvent]:
        answer = self.answer = Answer()
        started = time.monotonic()
        events = self.api.chat(self.model, self.messages(), self.options)
        try:
            with closing(events) as stream:
                for event in stream:
                    if isinstance(event, Delta):
                        if answer.first_text_seconds is None:
                            answer.first_text_seconds = time.monotonic() - started
                        answer.text += event.text
                    elif isinstance(event, Ended):
                        answer.finish_reason = event.finish_reason
                        answer.usage = event.usage
                    yield event
        finally:
            answer.total_seconds = time.monotonic() - started
            self._keep(answer)

    def _keep(self, answer: Answer) -> None:
        if answer.text or answer.finish_reason is not None:
            self.turns.append({"role": "assistant", "content": answer.text})
        else:
            # Templates want user and assistant in turn: a question without an answer goes too.
            self.turns.pop()
