"""Table of named keys, as ``k2 keys list`` prints it, and their JSON."""

from __future__ import annotations

import time
from collections.abc import Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any

from k2cli.ui.output import note, print_line

if TYPE_CHECKING:
    from k2cli.protocol import KeyLimits, NamedKey

_HEADINGS = ("NAME", "ID", "CREATED", "EXPIRES", "LIMITS")


def key_document(key: NamedKey) -> dict[str, Any]:
    """Return the JSON object of a key: everything but its digest."""
    import msgspec

    document: dict[str, Any] = msgspec.to_builtins(key)
    del document["digest"]
    return document


def print_keys(keys: Sequence[NamedKey]) -> None:
    """Print one line per key."""
    if not keys:
        note("no keys; make one with: k2 keys create NAME")
        return
    rows = [_HEADINGS, *(_row(key) for key in keys)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEADINGS))]
    for row in rows:
        fields = (field.ljust(width) for field, width in zip(row, widths, strict=True))
        print_line("  ".join(fields).rstrip())


def _row(key: NamedKey) -> tuple[str, ...]:
    expires = "never" if key.expires is None else _day(key.expires)
    if key.expires is not None and key.expires <= time.time():
        expires = "expired"
    name = f"{key.name} (monitor)" if key.monitors else key.name
    return (name, key.key_id, _day(key.created), expires, _limits(key.limits))


def _day(seconds: float) -> str:
    try:
        return f"{datetime.fromtimestamp(seconds):%Y-%m-%d}"
    except (OverflowError, ValueError, OSError):  # a number that is no date
        return "?"


def _limits(limits: KeyLimits) -> str:
    found = []
    if limits.max_concurrent is not None:
        found.append(f"{limits.max_concurrent} at a time")
    if limits.max_queued is not None:
        found.append(f"{limits.max_queued} waiting")
    if limits.tokens_per_minute is not None:
        found.append(f"{limits.tokens_per_minute} tokens/min")
    return ", ".join(found) or "none"
