"""Statistics of an answer, as a line of text and as a JSON document."""

from __future__ import annotations

from typing import Any

from k2cli.chat.session import Answer
from k2cli.client.answers import count
from k2cli.units import format_duration

SCHEMA_VERSION = 1


def figures_line(answer: Answer) -> str:
    """Format tokens, speed and time to first token, as far as they are known."""
    parts = []
    if (prompt_tokens := answer.usage.get("prompt_tokens")) is not None:
        parts.append(f"{prompt_tokens} prompt tokens{_cached_share(answer)}")
    if (generated := answer.usage.get("completion_tokens")) is not None:
        parts.append(f"{generated} tokens{_shares(answer)}")
    if (rate := answer.tokens_per_second) is not None:
        parts.append(f"{rate:.1f} tokens/s")
    if answer.first_text_seconds is not None:
        parts.append(f"first token after {format_duration(answer.first_text_seconds)}")
    parts.append(f"{format_duration(answer.total_seconds)} in all")
    if answer.finish_reason == "length":
        parts.append("cut off at the token limit")
    return " · ".join(parts)


def _cached_share(answer: Answer) -> str:
    details = answer.usage.get("prompt_tokens_details")
    tokens = count(details.get("cached_tokens")) if isinstance(details, dict) else None
    return f" ({tokens} cached)" if tokens else ""


def _shares(answer: Answer) -> str:
    """Say how many tokens were reasoning, and how many were guessed right."""
    details = answer.usage.get("completion_tokens_details")
    if not isinstance(details, dict):
        return ""
    names = {"reasoning_tokens": "of reasoning", "accepted_prediction_tokens": "guessed"}
    counts = [(count(details.get(name)), what) for name, what in names.items()]
    shares = [f"{tokens} {what}" for tokens, what in counts if tokens]
    return f" ({', '.join(shares)})" if shares else ""


def answer_document(
    model: str,
    answer: Answer,
    error: str | None = None,
    *,
    parsed: bool = False,
    calls: list[dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """Build the document of ``k2 chat --json``.

    Args:
        error: why the answer broke off or does not obey its schema; the document has it only then.
        parsed: True to include the value of the answer, None if there is an error.
        calls: calls of tools with their results; None without tools.
    """
    document: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "model": model,
        "answer": answer.text,
        "reasoning": answer.reasoning,
        "finish_reason": answer.finish_reason,
        "usage": {name: value for name, value in answer.usage.items() if name != "timings"},
        "timings": {
            **(answer.timings or {}),
            "first_text_seconds": answer.first_text_seconds,
            "total_seconds": answer.total_seconds,
            "tokens_per_second": answer.tokens_per_second,
        },
    }
    if parsed:
        document["parsed"] = answer.parsed
    if calls is not None:
        document["tool_calls"] = calls
    return document if error is None else {**document, "error": error}
