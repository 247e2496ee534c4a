"""Notes beside a model's record: when it was verified last, and which of its files are unchanged.

The second note has size, time of change and inode of each file that was found to be right. A later
transfer need not read a file again that still has the same ones.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

import msgspec

from k2cli.files import decode_json, encode_json, read_regular, write_atomically
from k2cli.models.sources.snapshot_record import record_path

_MAX_NOTE_BYTES = 50_000_000


class VerifiedNote(msgspec.Struct, frozen=True):
    """Time of the last full verification in which every file was right, in UTC."""

    verified_at: str
    files: int
    bytes: int
    schema_version: int = 1


class FileState(msgspec.Struct, frozen=True):
    """State in which a file had the content that ``content_hash`` names.

    ``checked`` is ``whole`` if all of its bytes were hashed, and ``pieces`` if it was received in
    pieces, each of which was hashed at both ends.
    """

    nbytes: int
    modified_ns: int
    inode: int
    content_hash: str
    checked: Literal["whole", "pieces"] = "whole"


class _States(msgspec.Struct, frozen=True):
    files: dict[str, FileState]
    schema_version: int = 1


def verified_path(folder: Path) -> Path:
    """Return the path of the note about the last full verification of a model's folder."""
    return _beside(folder, ".verified.json")


def states_path(folder: Path) -> Path:
    """Return the path of the note about the states of a model's files."""
    return _beside(folder, ".states.json")


def _beside(folder: Path, ending: str) -> Path:
    path = record_path(folder)
    return path.with_name(f"{path.name.removesuffix('.json')}{ending}")


def read_verified(folder: Path) -> VerifiedNote | None:
    """Return the note about the last full verification; None if there was none."""
    try:
        return decode_json(read_regular(verified_path(folder), _MAX_NOTE_BYTES), VerifiedNote)
    except (OSError, msgspec.DecodeError):
        return None


def write_verified(folder: Path, files: int, nbytes: int) -> None:
    """Note that all files of a model were verified now; do nothing if that cannot be written."""
    now = datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
    _write(verified_path(folder), VerifiedNote(now, files, nbytes))


def forget_verified(folder: Path) -> None:
    """Remove the note about the last full verification, which has become wrong."""
    with contextlib.suppress(OSError):
        verified_path(folder).unlink(missing_ok=True)


def read_states(folder: Path) -> dict[str, FileState]:
    """Return the states in which files of a model were right, by name."""
    try:
        return decode_json(read_regular(states_path(folder), _MAX_NOTE_BYTES), _States).files
    except (OSError, msgspec.DecodeError):
        return {}


def write_states(folder: Path, states: Mapping[str, FileState]) -> None:
    """Write the states of a model's files; do nothing if that is not possible."""
    _write(states_path(folder), _States(dict(states)))


def _write(path: Path, note: msgspec.Struct) -> None:
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, encode_json(note))


def state_of(
    path: Path, content_hash: str, checked: Literal["whole", "pieces"] = "whole"
) -> FileState | None:
    """Return the state of a file that has the content of this hash; None if it is not there."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return FileState(found.st_size, found.st_mtime_ns, found.st_ino, content_hash, checked)
