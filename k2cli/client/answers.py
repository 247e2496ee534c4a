"""Answers of an OpenAI-compatible server, which may be of any form: JSON, and streams of events.

What has another form than k2 expects is left out, or is an error that names the server.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import msgspec

from k2cli.errors import ClusterError, K2Error
from k2cli.files import decode_json
from k2cli.units import MIB

_MAX_LINE_BYTES = 8 * MIB
_MAX_COUNT = 2**40


@dataclass(frozen=True, slots=True)
class Delta:
    """A piece of the answer."""

    text: str


@dataclass(frozen=True, slots=True)
class ReasoningDelta:
    """A piece of the reasoning before the answer."""

    text: str


@dataclass(frozen=True, slots=True)
class CallDelta:
    """A piece of a call of a tool; ``name`` and ``call_id`` come with the first one.

    ``index`` counts the calls of an answer.
    """

    index: int
    call_id: str
    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class Progress:
    """Progress of a request; None for values that the server did not send."""

    queue_position: int | None = None
    prefill_done: int | None = None
    prefill_total: int | None = None
    completion_tokens: int | None = None
    cached_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class Ended:
    """End of a complete answer; ``usage`` is empty if the server sent none."""

    finish_reason: str
    usage: dict[str, Any]


StreamEvent = Delta | ReasoningDelta | CallDelta | Progress | Ended


@dataclass(frozen=True, slots=True)
class Timings:
    """Durations of one request by the server's clock: prefill includes the first token."""

    queue_seconds: float
    prefill_seconds: float
    decode_seconds: float


def error_message(content: bytes) -> str | None:
    """Return the message of an OpenAI error object, or None if the body is not one."""
    error = _error_member(content)
    message = error.get("message") if isinstance(error, dict) else error
    return message if isinstance(message, str) else None


def concerns_field(content: bytes, field: str) -> bool:
    """Return True if an OpenAI error object names a field of the request, or one within it."""
    error = _error_member(content)
    param = error.get("param") if isinstance(error, dict) else None
    where = param if isinstance(param, str) else error_message(content) or ""
    return where == field or where.startswith((f"{field}.", f"{field}[", f"{field}:"))


def _error_member(content: bytes) -> Any:
    try:
        return decode_json(content, type=dict[str, Any]).get("error")
    except msgspec.MsgspecError:
        return None


def decoded(content: bytes | str, base: str) -> dict[str, Any]:
    try:
        return decode_json(content, type=dict[str, Any])
    except msgspec.MsgspecError as error:
        raise no_openai_api(base, error) from error


def no_openai_api(base: str, error: Exception) -> K2Error:
    return K2Error(f"{base} does not answer as an OpenAI API: {error}")


def objects(value: Any) -> list[dict[str, Any]]:
    """Return the objects in a list of a server; none if it is no list."""
    return [each for each in value if isinstance(each, dict)] if isinstance(value, list) else []


def count(value: Any) -> int | None:
    """Return a number of tokens or requests of a server; None for anything else."""
    is_count = isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _MAX_COUNT
    return value if is_count else None


def lines(chunks: Iterator[bytes], base: str) -> Iterator[str]:
    """Split a stream into its lines.

    Raises:
        K2Error: if one is too long.
    """
    rest = b""
    for chunk in chunks:
        *whole, rest = (rest + chunk).split(b"\n")
        for line in whole:
            yield line.decode(errors="replace").rstrip("\r")
        if len(rest) > _MAX_LINE_BYTES:
            raise K2Error(f"{base} sends a line of more than {_MAX_LINE_BYTES} bytes")
    if rest:
        yield rest.decode(errors="replace")


def events(lines: Iterator[str], base: str) -> Iterator[StreamEvent]:
    """Read server-sent events up to ``[DONE]``.

    Raises:
        ClusterError: if the stream contains an error, or ends without a finish reason.
    """
    reason: str | None = None
    usage: dict[str, Any] = {}
    for line in lines:
        if not line.startswith("data:"):
            continue
        data = line[len("data:") :].strip()
        if data == "[DONE]":
            break
        chunk = decoded(data, base)
        if "error" in chunk:
            message = error_message(data.encode()) or "unknown error"
            raise ClusterError(f"the answer broke off: {message}", "k2 ps")
        yield from _chunk_events(chunk)
        if isinstance(found := chunk.get("usage"), dict):
            usage = found or usage
        for choice in objects(chunk.get("choices")):
            if isinstance(end := choice.get("finish_reason"), str):
                reason = end or reason
    if reason is None:
        raise ClusterError(f"the answer broke off: {base} closed the stream early", "k2 ps")
    yield Ended(reason, usage)


def _chunk_events(chunk: dict[str, Any]) -> Iterator[StreamEvent]:
    if isinstance(extension := chunk.get("k2"), dict):
        yield Progress(
            queue_position=count(extension.get("queue_position")),
            prefill_done=count(extension.get("prefill_done")),
            prefill_total=count(extension.get("prefill_total")),
            completion_tokens=count(extension.get("completion_tokens")),
            cached_tokens=count(extension.get("cached_tokens")),
        )
    for choice in objects(chunk.get("choices")):
        delta = choice.get("delta")
        members = delta if isinstance(delta, dict) else {}
        # Servers have one of these names, or both for the same text, as k2's has.
        thoughts = members.get("reasoning_content") or members.get("reasoning")
        if isinstance(thoughts, str) and thoughts:
            yield ReasoningDelta(thoughts)
        text = choice.get("text") or members.get("content")
        if isinstance(text, str) and text:
            yield Delta(text)
        for position, call in enumerate(objects(members.get("tool_calls"))):
            yield _call_delta(call, position)


def _call_delta(call: dict[str, Any], position: int) -> CallDelta:
    function = call.get("function")
    members = function if isinstance(function, dict) else {}
    index = count(call.get("index"))
    return CallDelta(
        position if index is None else index,
        _text(call.get("id")),
        _text(members.get("name")),
        _text(members.get("arguments")),
    )


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""


def read_timings(times: Any) -> Timings | None:
    """Read the ``timings`` member of a usage object; None if it is not that of k2."""
    try:
        return msgspec.convert(times, Timings)
    except msgspec.ValidationError:
        return None
