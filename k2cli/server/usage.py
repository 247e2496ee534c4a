"""Tokens and times that an answer used, for the usage objects of all dialects.

The engine measures the durations on the leader rank. A rate without a measured duration is null.
"""

from __future__ import annotations

from dataclasses import dataclass

from k2cli.protocol import Finished


def _rate(count: int, seconds: float) -> float | None:
    return count / seconds if count > 0 and seconds > 0 else None


def timings(finished: Finished) -> dict[str, float | None]:
    """Compute seconds and tokens per second of one request.

    Prefill produces the first token, so decode made one token less than the completion has. Only
    computed prompt tokens count for prefill, not those taken from a cache.
    """
    computed = finished.prompt_tokens - finished.cached_tokens
    return {
        "queue_seconds": finished.queue_seconds,
        "prefill_seconds": finished.prefill_seconds,
        "decode_seconds": finished.decode_seconds,
        "prefill_tokens_per_second": _rate(computed, finished.prefill_seconds),
        "decode_tokens_per_second": _rate(finished.completion_tokens - 1, finished.decode_seconds),
    }


@dataclass(frozen=True, slots=True)
class AnswerUsage:
    """Tokens and times of one answer, for the usage objects of all dialects.

    Attributes:
        prompt_tokens, completion_tokens: tokens read and generated.
        reasoning_tokens: the part of ``completion_tokens`` that was reasoning.
        max_tokens: the limit of the answer, if the client asked for more than the context has room.
        finished: the engine's last message; None if it did not come in time.
    """

    prompt_tokens: int
    completion_tokens: int
    reasoning_tokens: int = 0
    max_tokens: int | None = None
    finished: Finished | None = None

    @property
    def cached_tokens(self) -> int:
        """The number of prompt tokens that came from the prefix cache."""
        return self.finished.cached_tokens if self.finished else 0

    @property
    def draft_tokens(self) -> int:
        """The number of tokens that were guessed and verified."""
        return self.finished.draft_tokens if self.finished else 0

    @property
    def accepted_tokens(self) -> int:
        """The number of guessed tokens that the model generated, too."""
        return self.finished.accepted_tokens if self.finished else 0
