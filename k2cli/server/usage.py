"""What an answer cost: OpenAI's usage object, with k2's timings in it.

The durations are the engine's own, measured on the leader rank; a rate is left out (null) where
nothing was measured to divide by.
"""

from __future__ import annotations

from typing import Any

from k2cli.protocol import Finished


def _rate(count: int, seconds: float) -> float | None:
    return count / seconds if count > 0 and seconds > 0 else None


def timings(finished: Finished) -> dict[str, float | None]:
    """Seconds and tokens per second of one request.

    The first token comes out of prefill, so decoding made one less than the completion has; only
    prompt tokens that were computed, not those taken from a cache, count for prefill.
    """
    computed = finished.prompt_tokens - finished.cached_tokens
    return {
        "queue_seconds": finished.queue_seconds,
        "prefill_seconds": finished.prefill_seconds,
        "decode_seconds": finished.decode_seconds,
        "prefill_tokens_per_second": _rate(computed, finished.prefill_seconds),
        "decode_tokens_per_second": _rate(finished.completion_tokens - 1, finished.decode_seconds),
    }


def usage(finished: Finished | None, prompt_tokens: int, completion_tokens: int) -> dict[str, Any]:
    """The usage object. ``finished`` is None where the engine's account did not come in time."""
    cached = finished.cached_tokens if finished else 0
    members: dict[str, Any] = {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": cached},
    }
    if finished is not None:
        members["timings"] = timings(finished)
    return members
