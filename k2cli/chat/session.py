"""Conversation with a model: its turns, and the current answer with its statistics.

A partial answer, stopped by the user or cut off by a failure, stays in the conversation, so that
the next question can refer to it. A question without any answer is kept apart, to be sent again.
"""

from __future__ import annotations

import time
from collections.abc import Generator
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

from k2cli.chat.calls import CallCollector, ToolCall, open_calls
from k2cli.chat.schema import AnswerSchema
from k2cli.client.answers import CallDelta, Delta, Ended, ReasoningDelta, StreamEvent, count
from k2cli.client.client import ApiClient, GenerationOptions, ModelInfo
from k2cli.errors import K2Error


@dataclass(slots=True)
class Answer:
    """One answer as it grows; ``finish_reason`` stays None if it breaks off.

    ``reasoning`` is no part of ``text``, and ``calls`` are those of tools, in a whole answer alone.
    ``first_text_seconds`` (time to first token, of any kind) is by the client's clock. ``parsed``
    is the value of an answer that obeys the session's schema.
    """

    text: str = ""
    reasoning: str = ""
    finish_reason: str | None = None
    usage: dict[str, Any] = field(default_factory=dict)
    first_text_seconds: float | None = None
    total_seconds: float = 0.0
    parsed: Any = None
    calls: list[ToolCall] = field(default_factory=list)

    @property
    def timings(self) -> dict[str, Any] | None:
        """Timings by the server's clock, or None if it sent none."""
        times = self.usage.get("timings")
        return times if isinstance(times, dict) else None

    @property
    def tokens_per_second(self) -> float | None:
        """Speed of generation by the server's clock, or else by the client's after first text."""
        if self.timings is not None:
            rate = self.timings.get("decode_tokens_per_second")
            return float(rate) if isinstance(rate, int | float) else None
        tokens = count(self.usage.get("completion_tokens"))
        if tokens is None or self.first_text_seconds is None:
            return None
        seconds = self.total_seconds - self.first_text_seconds
        return (tokens - 1) / seconds if seconds > 0 and tokens > 1 else None


@dataclass(slots=True)
class ChatSession:
    """A conversation with one model.

    Attributes:
        schema: the form that its answers obey, if there is one.
        tools: functions that the model may call, as in OpenAI's API.
        unsent: a question that got no answer.
        private: True to keep what the run computes off its disks.
    """

    api: ApiClient
    model: ModelInfo
    options: GenerationOptions = field(default_factory=GenerationOptions)
    system: str | None = None
    schema: AnswerSchema | None = None
    tools: list[dict[str, Any]] = field(default_factory=list)
    turns: list[dict[str, Any]] = field(default_factory=list)
    answer: Answer | None = None
    unsent: str | None = None
    private: bool = False

    def messages(self) -> list[dict[str, Any]]:
        """Return the conversation in the form of the API."""
        first: list[dict[str, Any]] = (
            [{"role": "system", "content": self.system}] if self.system else []
        )
        return first + self.turns

    def clear(self) -> None:
        """Forget all turns, but not the system prompt."""
        self.turns = []
        self.answer = None
        self.unsent = None

    def undo(self) -> str | None:
        """Remove the last question and its answer; return the question, None if there is none."""
        while self.turns:
            turn = self.turns.pop()
            if turn["role"] == "user":
                self.answer = None
                self.unsent = str(turn["content"])
                return self.unsent
        return None

    @property
    def open_calls(self) -> list[ToolCall]:
        """Calls of the last answer that have no result yet."""
        return open_calls(self.turns)

    @property
    def last_answer(self) -> str | None:
        """Text of the last answer; None if there is none."""
        turn = self.turns[-1] if self.turns else {"role": ""}
        return str(turn["content"]) if turn["role"] == "assistant" else None

    @property
    def last_reasoning(self) -> str:
        """Reasoning before the last answer; "" if there is none."""
        return str(self.turns[-1].get("reasoning_content", "")) if self.turns else ""

    @property
    def context_tokens(self) -> int | None:
        """Tokens of the conversation after its last answer; None if the server did not count."""
        usage = self.answer.usage if self.answer else {}
        prompt, generated = (
            count(usage.get(f"{name}_tokens")) for name in ("prompt", "completion")
        )
        return None if prompt is None or generated is None else prompt + generated

    def ask(self, question: str) -> Generator[StreamEvent]:
        """Ask a question and stream the answer; ``answer`` holds the part received so far.

        Close the generator to stop the answer, also on the server.

        Raises:
            K2Error: if the server refuses the request, the connection is lost, or the answer does
                not obey the schema.
        """
        self.unsent = None
        self.turns.append({"role": "user", "content": question})
        return self._stream()

    def regenerate(self) -> Generator[StreamEvent]:
        """Answer the last question again, and replace its answer once the new one begins.

        Raises:
            K2Error: if there is no question, and for the reasons of ``ask``.
        """
        if self.unsent is not None:
            return self.ask(self.unsent)
        replaced = None
        if self.turns and self.turns[-1]["role"] == "assistant":
            replaced = self.turns.pop()
        if not self.turns:
            raise K2Error("there is no question to answer again")
        return self._stream(replaced)

    def proceed(self) -> Generator[StreamEvent]:
        """Go on after the results of tools.

        Raises:
            K2Error: for the reasons of ``ask``.
        """
        return self._stream()

    def _stream(self, replaced: dict[str, Any] | None = None) -> Generator[StreamEvent]:
        answer = self.answer = Answer()
        calls = CallCollector()
        started = time.monotonic()
        form = None if self.schema is None else self.schema.response_format()
        events = self.api.chat(
            self.model, self.messages(), self.options, form, self.tools, private=self.private
        )
        try:
            with closing(events) as stream:
                for event in stream:
                    if isinstance(event, Delta | ReasoningDelta | CallDelta):
                        if answer.first_text_seconds is None:
                            answer.first_text_seconds = time.monotonic() - started
                        if isinstance(event, Delta):
                            answer.text += event.text
                        elif isinstance(event, ReasoningDelta):
                            answer.reasoning += event.text
                        else:
                            calls.add(event)
                    elif isinstance(event, Ended):
                        answer.finish_reason = event.finish_reason
                        answer.usage = event.usage
                        # Calls that the token limit cut off would run with half their arguments.
                        answer.calls = calls.whole() if event.finish_reason != "length" else []
                    yield event
            if self.schema is not None and not answer.calls:
                answer.parsed = self.schema.parse(answer.text, answer.finish_reason)
        finally:
            answer.total_seconds = time.monotonic() - started
            self._keep(answer, replaced)

    def _keep(self, answer: Answer, replaced: dict[str, Any] | None) -> None:
        if answer.text or answer.reasoning or answer.finish_reason is not None:
            turn: dict[str, Any] = {"role": "assistant", "content": answer.text}
            if answer.reasoning:
                # The model's chat template decides whether earlier reasoning is shown again.
                turn["reasoning_content"] = answer.reasoning
            if answer.calls:
                turn["tool_calls"] = [call.member() for call in answer.calls]
            self.turns.append(turn)
        elif replaced is not None:
            self.turns.append(replaced)
        elif self.turns[-1]["role"] == "user":
            # Chat templates require alternating roles, so an unanswered question is removed.
            self.unsent = str(self.turns.pop()["content"])
