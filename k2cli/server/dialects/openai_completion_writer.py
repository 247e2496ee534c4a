"""Answers as OpenAI's text completions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from k2cli.server.dialects.openai_writer import OpenAIWriter, openai_usage
from k2cli.server.generation import Ended
from k2cli.server.output.events import AnswerText, Blocks, OutputEvent
from k2cli.server.text_assembler import ScoredToken


class CompletionWriter(OpenAIWriter):
    """Writer of the objects of ``/v1/completions``."""

    def whole(self, blocks: Blocks, ended: Ended) -> dict[str, Any]:
        choice = self._choice(blocks.text, blocks.scores, ended.finish_reason)
        return {**self.chunk([choice]), "usage": openai_usage(ended.usage)}

    def opening(self, first: OutputEvent | None) -> dict[str, Any] | None:
        return None

    def delta(self, event: OutputEvent) -> dict[str, Any] | None:
        # Completions have no markers: their parser makes nothing but text.
        return (
            self._choice(event.text, event.scores, None) if isinstance(event, AnswerText) else None
        )

    def closing(self, reason: str) -> dict[str, Any]:
        return self._choice("", (), reason)

    def chunk(self, choices: list[dict[str, Any]], **members: Any) -> dict[str, Any]:
        return {**self.envelope("cmpl", "text_completion"), "choices": choices, **members}

    def _choice(
        self, text: str, scores: Sequence[ScoredToken], reason: str | None
    ) -> dict[str, Any]:
        logprobs = self._logprobs(scores) if self.scored else None
        return {"index": 0, "text": text, "logprobs": logprobs, "finish_reason": reason}

    def _logprobs(self, scores: Sequence[ScoredToken]) -> dict[str, Any]:
        token_text = self.context.token_text
        return {
            "tokens": [token_text(scored.token) for scored in scores],
            "token_logprobs": [scored.score.logprob for scored in scores],
            "top_logprobs": [
                {token_text(token): logprob for token, logprob in scored.score.top}
                for scored in scores
            ],
            "text_offset": [scored.offset for scored in scores],
        }
