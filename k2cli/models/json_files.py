"""JSON files of a checkpoint folder, whose author may be careless or hostile.

Every value that k2 uses is checked where it is read, and the error names the file.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from k2cli.errors import K2Error
from k2cli.files import read_regular
from k2cli.models.layout import download_hint, refuse_pointer
from k2cli.units import SURROGATE

MAX_JSON_BYTES = 50_000_000
_LARGEST_TOKEN = 2**31 - 1
_LARGEST_NUMBER = 2**48
_SAMPLING_NUMBERS = {"temperature": 0, "top_p": 0, "top_k": -1}
"""Defaults for sampling and their smallest values; a ``top_k`` of -1 means none."""


def read_json_object(path: Path) -> dict[str, Any]:
    """Read a JSON file of at most 50 MB that holds an object.

    Raises:
        K2Error: if it cannot be read, is too long, or does not hold a JSON object, or holds NaN.
    """
    try:
        text = read_regular(path, MAX_JSON_BYTES, follow_links=True)
    except OSError as error:
        raise K2Error(f"cannot read {path}: {error.strerror}") from error
    refuse_pointer(path, text)
    return json_object(text, path, download_hint(path))


def json_object(text: bytes, path: Path, hint: str | None = None) -> dict[str, Any]:
    """Parse the content of a JSON file that holds an object; the caller bounds its length.

    Args:
        path: of the file, here or in a repository, for messages.
        hint: what to do if it is not JSON.

    Raises:
        K2Error: if it is not a JSON object, or holds NaN.
    """
    try:
        document = json.loads(text)
        # An escape such as \\ud800 alone makes a text that no file, log or message can hold.
        if b"\\ud" in text.lower() and SURROGATE.search(json.dumps(document, ensure_ascii=False)):
            raise ValueError("a text in it is not valid Unicode")
    except (ValueError, RecursionError) as error:
        raise K2Error(f"{path} is not JSON: {error}", hint) from error
    if not isinstance(document, dict):
        raise K2Error(f"{path} must hold a JSON object, not {type(document).__name__}")
    if b"NaN" in text and (name := _field_with_nan(document)) is not None:
        raise K2Error(f"{path}: {name} must be a number, not nan")
    return document


def read_json_if_present(path: Path) -> dict[str, Any]:
    """Read a JSON file like ``read_json_object``; empty if nothing of that name is there.

    Raises:
        K2Error: as ``read_json_object``, also for a link to nothing.
    """
    return read_json_object(path) if os.path.lexists(path) else {}


def _field_with_nan(document: dict[str, Any]) -> str | None:
    """Find a field whose value is NaN. Infinity is allowed: configs of Mamba have it."""
    found: list[tuple[str, Any]] = list(document.items())
    while found:
        name, value = found.pop()
        if isinstance(value, float) and math.isnan(value):
            return name
        if isinstance(value, dict):
            found += value.items()
        elif isinstance(value, list):
            found += [(name, each) for each in value]
    return None


def read_generation_config(folder: Path) -> dict[str, Any]:
    """Read ``generation_config.json``: end tokens and sampling. Empty if there is none.

    Raises:
        K2Error: if it cannot be read, or a value that k2 uses is of another type or impossible.
    """
    path = folder / "generation_config.json"
    generation = read_json_if_present(path)
    end_tokens(path, generation.get("eos_token_id"))
    for name, least in _SAMPLING_NUMBERS.items():
        value = generation.get(name)
        if value is not None and not _is_number(value, least):
            raise K2Error(f"{path}: {name} must be a number from {least} on, not {shown(value)}")
    return generation


def _is_number(value: object, least: int) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return least <= value < _LARGEST_NUMBER  # False for NaN


def end_tokens(path: Path, value: object) -> list[int]:
    """Return ``eos_token_id`` as a list; configs hold one, several or none.

    ``path`` is for messages.

    Raises:
        K2Error: if it is neither a token id nor a list of them.
    """
    tokens: list[Any] = value if isinstance(value, list) else [] if value is None else [value]
    if any(
        isinstance(token, bool) or not isinstance(token, int) or not 0 <= token <= _LARGEST_TOKEN
        for token in tokens
    ):
        raise K2Error(
            f"{path}: eos_token_id must be an integer from 0 on or a list of them, "
            f"not {shown(value)}"
        )
    return tokens


def shown(value: object) -> str:
    """Format any JSON value for a message, in at most 60 characters."""
    # JSON may hold an integer of thousands of digits, for which str() raises.
    if isinstance(value, int) and abs(value) > 10**30:
        return f"a number of about {value.bit_length()} bits"
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # such an integer inside a list
        return f"this {type(value).__name__}"
    return text if len(text) <= 60 else f"{text[:60]}..."
