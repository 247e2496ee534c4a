"""Text of the log's line about a finished request: counts and times, never contents or keys.

A line is ``DIALECT STATUS`` and then ``name=value`` for what is known, without blanks in a value.
"""

from __future__ import annotations

from k2cli.server.metrics.request_record import RequestRecord
from k2cli.server.metrics.totals import Result


def access_line(
    record: RequestRecord, status: int, result: Result, error_code: str, now: float
) -> str:
    """Describe a finished request in one line.

    Args:
        record: the request.
        status: of the response; 200 for a stream that failed later.
        result: its end.
        error_code: of the error that the response is, or empty.
        now: a time of the monotonic clock.
    """
    if record.failure is not None:
        error_code = record.failure[1] or error_code
    if result == "unauthorized" or record.dialect == "other":
        # Anybody can cause these. Equal lines are folded to one, so they have nothing that varies.
        return _joined([record.dialect, str(status), ("code", error_code), ("end", result)])
    fields: list[str | tuple[str, str]] = [
        record.dialect, str(status), ("id", record.request_id), ("req", record.id),
        ("key", record.key), ("code", error_code),
    ]  # fmt: skip
    if record.queued_at is not None:
        admitted = record.admitted_at if record.admitted_at is not None else now
        first, rate = record.first_token_at, record.decode_tokens_per_second
        fields += [
            ("in", str(record.prompt_tokens)), ("cached", str(record.cached_tokens)),
            ("out", str(record.completion_tokens)), ("reasoning", str(record.reasoning_tokens)),
            ("queued", _seconds(admitted - record.queued_at)),
            ("first", "" if first is None else _seconds(first - record.began)),
        ]  # fmt: skip
        drafts = f"{record.accepted_tokens}/{record.draft_tokens}" if record.draft_tokens else ""
        fields += [("drafts", drafts)]
        fields += [("pauses", str(record.pauses) if record.pauses else "")]
        fields += [("rate", "" if rate is None else f"{rate:.1f}/s")]
    fields += [("total", _seconds(now - record.began))]
    fields += [("end", record.finish_reason or result)]
    return _joined(fields)


def _seconds(seconds: float) -> str:
    return f"{max(seconds, 0.0):.3f}s"


def _joined(fields: list[str | tuple[str, str]]) -> str:
    words = [field if isinstance(field, str) else "=".join(field) for field in fields
             if isinstance(field, str) or field[1]]  # fmt: skip
    return " ".join(words)
