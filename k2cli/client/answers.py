"""Decoding of a server's answers, which may have any shape."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import msgspec

from k2cli.errors import ClusterError, K2Error, NotAuthorisedError
from k2cli.files import decode_json


def failure(status: int, message: str, base: str) -> K2Error:
    """Return the error for a refused request, by its HTTP status."""
    if status in (401, 403):
        return NotAuthorisedError(f"{base}: {message}", "give --api-key, or set K2_API_KEY")
    if status == 503:
        return ClusterError(f"{base} cannot answer: {message}", "k2 ps")
    return K2Error(f"{base} refused the request: {message}")


def error_message(content: bytes) -> str | None:
    """Return the message of an OpenAI error object, or None if the body is not one."""
    try:
        error = decode_json(content, type=dict[str, Any]).get("error")
    except msgspec.MsgspecError:
        return None
    message = error.get("message") if isinstance(error, dict) else error
    return message if isinstance(message, str) else None


@contextmanager
def expected_shape(base: str) -> Iterator[None]:
    """Translate the errors of values that are not what an OpenAI API sends.

    Raises:
        K2Error: if a value is missing or of another type.
    """
    try:
        yield
    except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise K2Error(f"{base} does not answer as an OpenAI API: {reason}") from error


def checked_length(value: Any) -> int | None:
    """Return a model's context length, None if the server does not say it.

    Raises:
        ValueError: if it is not a positive number.
    """
    if value is not None and (not isinstance(value, int) or value < 1):
        raise ValueError(f"{value!r} is not a context length")
    return value


def decoded(content: bytes | str, base: str) -> dict[str, Any]:
    """Decode a JSON object.

    Raises:
        K2Error: if it is not one.
    """
    try:
        return decode_json(content, type=dict[str, Any])
    except msgspec.MsgspecError as error:
        raise K2Error(f"{base} does not answer as an OpenAI API: {error}") from error
