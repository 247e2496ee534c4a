"""Answers as OpenAI's chat completions.

Reasoning is no part of OpenAI's own format. Servers of open models send it as ``reasoning_content``
(DeepSeek, Moonshot) or ``reasoning`` (OpenRouter, vLLM); clients read one or the other, so both are
sent.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from k2cli.server.dialects.openai_writer import OpenAIWriter, openai_usage
from k2cli.server.generation import Ended
from k2cli.server.output.events import (
    AnswerText,
    Blocks,
    CallArguments,
    CallBegan,
    OutputEvent,
    ReasoningText,
)
from k2cli.server.text_assembler import ScoredToken


class ChatWriter(OpenAIWriter):
    """Writer of the objects of ``/v1/chat/completions``."""

    def whole(self, blocks: Blocks, ended: Ended) -> dict[str, Any]:
        choice = {
            "index": 0,
            "message": self._message(blocks),
            "logprobs": self._logprobs(blocks.scores),
            "finish_reason": ended.finish_reason,
        }
        envelope = self.envelope("chatcmpl", "chat.completion")
        return {**envelope, "choices": [choice], "usage": openai_usage(ended.usage)}

    def _message(self, blocks: Blocks) -> dict[str, Any]:
        calls = [
            _call(call.call_id, {"name": call.name, "arguments": call.arguments})
            for call in blocks.calls
        ]
        # OpenAI's form for calls alone; an answer without anything is an empty text.
        content = blocks.text or (None if calls else "")
        message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
        if blocks.reasoning and self._shows_reasoning:
            message |= _reasoning(blocks.reasoning)
        return {**message, "tool_calls": calls} if calls else message

    @property
    def _shows_reasoning(self) -> bool:
        return self.context.request.output.include_reasoning

    def opening(self, first: OutputEvent | None) -> dict[str, Any] | None:
        # Clients take an empty text for the beginning of an answer with text.
        text = "" if first is None or isinstance(first, AnswerText) else None
        return self._choice({"role": "assistant", "content": text})

    def delta(self, event: OutputEvent) -> dict[str, Any] | None:
        match event:
            case AnswerText(text=text, scores=scores):
                return self._choice({"content": text}, self._logprobs(scores))
            case ReasoningText(text=text) if text and self._shows_reasoning:
                return self._choice(_reasoning(text))
            case CallBegan(index=index, call_id=call_id, name=name):
                call = _call(call_id, {"name": name, "arguments": ""})
                return self._choice({"tool_calls": [{"index": index, **call}]})
            case CallArguments(index=index, text=text):
                call = {"index": index, "function": {"arguments": text}}
                return self._choice({"tool_calls": [call]})
            case _:
                return None

    def closing(self, reason: str) -> dict[str, Any]:
        return self._choice({}, reason=reason)

    def chunk(self, choices: list[dict[str, Any]], **members: Any) -> dict[str, Any]:
        envelope = self.envelope("chatcmpl", "chat.completion.chunk")
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
        text = self.context.token_text(token)
        # If a token is a part of a character, its bytes cannot be derived from the text.
        as_bytes = None if "\ufffd" in text else list(text.encode())
        return {"token": text, "logprob": logprob, "bytes": as_bytes}


def _reasoning(text: str) -> dict[str, Any]:
    return {"reasoning_content": text, "reasoning": text}


def _call(call_id: str, function: dict[str, Any]) -> dict[str, Any]:
    return {"id": call_id, "type": "function", "function": function}
