"""OpenAI's usage object of an answer, with k2's timings.

The engine measures the durations on the leader rank. A rate without a measured duration is null.
"""

from __future__ import annotations

from typing import Any

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


def usage(
    finished: Finished | None,
    prompt_tokens: int,
    completion_tokens: int,
    max_tokens: int | None = None,
) -> dict[str, Any]:
    """Make the usage object.

    Args:
        finished: the engine's last message; None if it did not come in time.
        prompt_tokens, completion_tokens: tokens read and generated.
        max_tokens: the limit of the answer, if the client asked for more than the context has room.
    """
    cached = finished.cached_tokens if finished else 0
    members: dict[str, Any] = {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": cached},
    }
    if max_tokens is not None:
        members["max_tokens"] = max_tokens
    if finished is not None:
        members["timings"] = timings(finished)
    return members
