"""Table of the caches of prompts on a disk, as ``k2 cache list`` prints it, and their JSON."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any

from k2cli.ui.output import note, print_line
from k2cli.units import format_bytes, one_line

if TYPE_CHECKING:
    from k2cli.prefix_folder import StoreFolder

_HEADINGS = ("MODEL", "RANK", "TOKENS", "SIZE", "LAST USE", "")


def store_document(store: StoreFolder) -> dict[str, Any]:
    """Return the JSON object of the caches of one rank."""
    return {
        "model": store.model,
        "rank": store.rank,
        "ranks": store.ranks,
        "tokens": store.tokens,
        "bytes": store.nbytes,
        "last_use": store.used,
        "in_use": store.in_use,
        "folder": str(store.folder),
    }


def print_stores(stores: Sequence[StoreFolder]) -> None:
    """Print one line per model and rank; those that are empty are left out."""
    stores = [store for store in stores if not store.is_empty]
    if not stores:
        note("no caches of prompts; to keep some: k2 launch MODEL --prefix-cache-disk 50GB")
        return
    rows = [_HEADINGS, *(_row(store) for store in stores)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEADINGS))]
    for row in rows:
        fields = (field.ljust(width) for field, width in zip(row, widths, strict=True))
        print_line("  ".join(fields).rstrip())


def _row(store: StoreFolder) -> tuple[str, ...]:
    rank = f"{store.rank} of {store.ranks}" if store.ranks else "?"
    tokens, size = f"{store.tokens:,}", format_bytes(store.nbytes)
    used = "used by a run" if store.in_use else ""
    if used and not store.nbytes:
        used += ", nothing stored yet"
    return (one_line(store.model) or "?", rank, tokens, size, _time(store.used), used)


def _time(seconds: float) -> str:
    try:
        return f"{datetime.fromtimestamp(seconds):%Y-%m-%d %H:%M}"
    except (OverflowError, ValueError, OSError):  # a number that is no date
        return "?"
