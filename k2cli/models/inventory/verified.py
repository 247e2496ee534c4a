"""When each file of a model was last compared with its hash, and by what.

Downloads and pushes of k2 hash every byte on its way, and ``k2 models verify`` reads the files
again.
Files that another program fetched are verified only by that command.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Literal

import msgspec

from k2cli.files import decode_json, encode_json, read_regular, write_atomically
from k2cli.models.sources.snapshot_record import record_path

_LIMIT_BYTES = 16 * 2**20
_CLOCK_SECONDS = 0.1
"""Difference that the clocks of a file system and of a process may have."""

How = Literal["download", "push", "verify"]


class Verified(msgspec.Struct, frozen=True):
    """The time of a verification, in seconds since the epoch, and what has verified."""

    time: float
    by: How


class _Note(msgspec.Struct, frozen=True):
    files: dict[str, Verified] = {}
    schema_version: int = 1


def note_path(folder: Path) -> Path:
    """Return the file with the times, beside the record of the model's files."""
    record = record_path(folder)
    return record.with_name(f"{record.stem}.verified.json")


def note_verified(folder: Path, names: Collection[str], by: How) -> None:
    """Note that files were found to be right just now; nothing if that cannot be written."""
    if not names:
        return
    known = verified_files(folder) | dict.fromkeys(names, Verified(time.time(), by))
    path = note_path(folder)
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, encode_json(_Note(known)))


def verified_files(folder: Path) -> dict[str, Verified]:
    """Return the last verification of each file of a folder, by name, as far as it is known."""
    try:
        return decode_json(read_regular(note_path(folder), _LIMIT_BYTES), _Note).files
    except (OSError, msgspec.DecodeError):
        return {}


def last_verified(folder: Path, changed: Mapping[str, float]) -> Verified | None:
    """Return the oldest of the last verifications of some files.

    Args:
        folder: the model's folder.
        changed: the last change of each file, in seconds since the epoch. If one has changed since
            it was verified, or never was, there is no answer.
    """
    known = verified_files(folder)
    found = [known.get(name) for name in changed]
    times = [each for each in found if each is not None]
    current = all(
        each is not None and each.time + _CLOCK_SECONDS >= when
        for each, when in zip(found, changed.values(), strict=True)
    )
    return min(times, key=lambda each: each.time) if times and current else None
