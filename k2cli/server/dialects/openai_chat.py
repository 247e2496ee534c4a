"""Answers as OpenAI's chat completions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from k2cli.server.dialects.openai_stream import OpenAIWriter
from k2cli.server.generation import Ended
from k2cli.server.output.events import AnswerText, Blocks, OutputEvent
from k2cli.server.text import ScoredToken
from k2cli.server.usage import openai_usage


class ChatWriter(OpenAIWriter):
    """Writer of the objects of ``/v1/chat/completions``."""

    def whole(self, blocks: Blocks, ended: Ended) -> dict[str, Any]:
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": blocks.text, "refusal": None},
            "logprobs": self._logprobs(blocks.scores),
            "finish_reason": ended.finish_reason,
        }
        envelope = self.envelope("chatcmpl", "chat.completion")
        return {**envelope, "choices": [choice], "usage": openai_usage(ended.usage)}

    def opening(self) -> dict[str, Any] | None:
        return self._choice({"role": "assistant", "content": ""})

    def delta(self, event: OutputEvent) -> dict[str, Any] | None:
        match event:
            case AnswerText(text=text, scores=scores):
                return self._choice({"content": text}, self._logprobs(scores))
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
