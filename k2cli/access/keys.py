"""Make and describe named keys: the random key, its digest, its name and its time."""

from __future__ import annotations

import hashlib
import re
import secrets
from collections.abc import Sequence
from typing import Literal

from k2cli.errors import UsageError
from k2cli.protocol import NamedKey
from k2cli.units import one_line

KEY_PREFIX = "k2-"
"""Begin of every key, so that programs that search for leaked secrets can know one."""

_KEY_BYTES = 32
MAX_NAME_LETTERS = 64
_NAME = re.compile(rf"[A-Za-z0-9][A-Za-z0-9._@-]{{0,{MAX_NAME_LETTERS - 1}}}")
_RESERVED = frozenset({"all", "none"})
_DURATION = re.compile(r"(\d{1,9})([smhdwy])")
_UNIT_SECONDS = {
    "s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 7 * 86_400, "y": 365 * 86_400
}  # fmt: skip
_MAX_SECONDS = 100 * _UNIT_SECONDS["y"]

KeyChoice = Literal["all", "none"] | list[str]
"""The named keys that a run accepts: all that there are at any time, none, or those of a name."""


def make_key() -> str:
    """Return a new random key of 46 letters."""
    return f"{KEY_PREFIX}{secrets.token_urlsafe(_KEY_BYTES)}"


def digest_of(key: bytes) -> str:
    """Return the SHA-256 of a key as hex.

    A slow hash with salt protects passwords, which people choose and can be guessed. A key has 256
    random bits: nobody can try them out, however fast the hash is, and no two are alike. A slow one
    would only let strangers keep the server busy with wrong keys.
    """
    return hashlib.sha256(key).hexdigest()


def make_key_id() -> str:
    """Return a new id of a key: random, short and no secret."""
    return secrets.token_hex(4)


def checked_name(name: str) -> str:
    """Return a name that a key can have.

    Raises:
        UsageError: if it cannot.
    """
    if _NAME.fullmatch(name) and name.lower() not in _RESERVED:
        return name
    raise UsageError(
        f"'{one_line(name)}' cannot be the name of a key",
        f"up to {MAX_NAME_LETTERS} letters, digits, '.', '_', '@' and '-', but not 'all' or "
        "'none': k2 keys create alice",
    )


def parse_duration(text: str) -> float:
    """Return the seconds of a text such as ``30d``, ``12h`` or ``1y``.

    Raises:
        UsageError: if it is not a duration from 1 second to 100 years.
    """
    match = _DURATION.fullmatch(text)
    seconds = int(match[1]) * _UNIT_SECONDS[match[2]] if match and match[1].isascii() else 0
    if not 0 < seconds <= _MAX_SECONDS:
        raise UsageError(
            f"--expires '{one_line(text)}' is not a duration of up to 100 years",
            "a number with s, m, h, d, w or y: --expires 30d",
        )
    return float(seconds)


def parse_choice(text: str) -> KeyChoice:
    """Return the choice that the value of ``--keys`` means.

    Raises:
        UsageError: if a name is empty, or cannot be the name of a key.
    """
    match text.strip().lower():
        case "all":
            return "all"
        case "none":
            return "none"
    names = [name.strip() for name in text.split(",")]
    if not all(names):
        raise UsageError(
            f"--keys '{one_line(text)}' has an empty name", "--keys alice,bob, or --keys all"
        )
    return list(dict.fromkeys(checked_name(name) for name in names))


def chosen(keys: Sequence[NamedKey], choice: KeyChoice) -> list[NamedKey]:
    """Return the keys of a choice. A chosen name without a key has no effect."""
    if choice == "all":
        return list(keys)
    return [] if choice == "none" else [key for key in keys if key.name in choice]
