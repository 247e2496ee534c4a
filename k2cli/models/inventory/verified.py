"""Times at which each file of a model was last compared with its hash, and by what.

Downloads and pushes of k2 hash every byte on its way, and ``k2 models verify`` reads the files
again.
Files that another program fetched are verified only by that command.
"""

from __future__ import annotations

import os
import time
from collections.abc import Collection, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Literal

import msgspec

from k2cli.files import decode_json, encode_json, read_regular, write_atomically
from k2cli.models.inventory.known_folders import folder_key
from k2cli.models.layout import INDEX_NAME, supporting_files
from k2cli.models.sources.snapshot_record import record_path
from k2cli.settings import data_directory

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
    """Return the file with the times: in a repository of the Hub's cache, or else in k2's folder.

    Revisions of one repository share their contents, and so this file.
    """
    if folder.parent.name == "snapshots":
        return record_path(folder).with_name("verified.json")
    return data_directory() / "verified" / f"{folder_key(folder)}.json"


def _key(folder: Path, name: str) -> str:
    """Return the name of a file in the note: in the Hub's cache, the hash that it links to."""
    if folder.parent.name != "snapshots":
        return name
    path = folder / name
    return os.path.basename(os.readlink(path)) if path.is_symlink() else f"{folder.name}/{name}"


def note_verified(folder: Path, names: Collection[str], by: How) -> None:
    """Note that files were found to be right just now; nothing if that cannot be written."""
    if not names:
        return
    path = note_path(folder)
    with suppress(OSError):
        now = dict.fromkeys((_key(folder, name) for name in names), Verified(time.time(), by))
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, encode_json(_Note(_read(path) | now)))


def _read(path: Path) -> dict[str, Verified]:
    try:
        return decode_json(read_regular(path, _LIMIT_BYTES), _Note).files
    except (OSError, msgspec.DecodeError):
        return {}


def is_read(name: str) -> bool:
    """True for a file that loading reads, whose verification counts."""
    is_weight = name.endswith(".safetensors") and not name.startswith(".")
    return is_weight or name == INDEX_NAME or bool(supporting_files([name]))


def last_verified(folder: Path, changed: Mapping[str, float]) -> Verified | None:
    """Return the oldest of the last verifications of some files.

    Args:
        folder: the model's folder.
        changed: the last change of each file, in seconds since the epoch. If one has changed since
            it was verified, or never was, there is no answer.
    """
    known = _read(note_path(folder))
    found = []
    for name, when in changed.items():
        last = known.get(_key(folder, name))
        if last is None or last.time + _CLOCK_SECONDS < when:
            return None
        found.append(last)
    return min(found, key=lambda each: each.time, default=None)
