"""Note of the files of a model that were found to be right: when, by what, and in which state.

Downloads and pushes of k2 hash every byte on its way, and ``k2 models verify`` reads the files
again. A file counts as verified as long as its size, time of change and inode are those of
the note; ``k2 models list`` shows the time, and a push need not read it again. Files that
another program fetched are verified only by ``k2 models verify``.
"""

from __future__ import annotations

import os
import time
from collections.abc import Collection, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Literal

import msgspec

from k2cli.files import (
    decode_json,
    encode_json,
    is_of_later_version,
    read_regular,
    write_atomically,
)
from k2cli.models.inventory.known_folders import folder_key
from k2cli.models.layout import INDEX_NAME, supporting_files
from k2cli.models.sources.snapshot_record import record_path
from k2cli.settings import data_directory

_SCHEMA_VERSION = 1
_MAX_NOTE_BYTES = 50_000_000

How = Literal["download", "push", "verify"]
Checked = Literal["whole", "pieces"]


class Verified(msgspec.Struct, frozen=True):
    """The time of a verification, in seconds since the epoch, and what has verified."""

    time: float
    by: How


class FileState(msgspec.Struct, frozen=True):
    """State in which a file had the content that ``content_hash`` names.

    ``checked`` is ``whole`` if all of its bytes were hashed, and ``pieces`` if it was received in
    pieces, each of which was hashed at both ends. ``time`` is in seconds since the epoch.
    """

    nbytes: int
    modified_ns: int
    inode: int
    content_hash: str
    time: float
    by: How
    checked: Checked = "whole"

    def is_of(self, path: Path) -> bool:
        """True if a file is still in this state."""
        try:
            found = os.stat(path)
        except OSError:
            return False
        now = (found.st_size, found.st_mtime_ns, found.st_ino)
        return now == (self.nbytes, self.modified_ns, self.inode)


class _Note(msgspec.Struct, frozen=True):
    files: dict[str, FileState] = {}
    schema_version: int = _SCHEMA_VERSION


def state_of(
    path: Path, content_hash: str, by: How, checked: Checked = "whole"
) -> FileState | None:
    """Return the state of a file that has the content of this hash; None if it is not there."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    state = (found.st_size, found.st_mtime_ns, found.st_ino)
    return FileState(*state, content_hash, time.time(), by, checked)


def note_path(folder: Path) -> Path:
    """Return the file with the note: in a repository of the Hub's cache, or else in k2's folder.

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


def _read(path: Path) -> dict[str, FileState]:
    try:
        note = decode_json(read_regular(path, _MAX_NOTE_BYTES), _Note)
    except (OSError, msgspec.DecodeError):
        return {}
    return note.files if note.schema_version == _SCHEMA_VERSION else {}


def read_states(folder: Path, names: Collection[str]) -> dict[str, FileState]:
    """Return the states in which files of a model were right, by name."""
    known = _read(note_path(folder))
    if not known:
        return {}
    keys = {name: _key(folder, name) for name in names}
    return {name: known[key] for name, key in keys.items() if key in known}


def note_states(folder: Path, states: Mapping[str, FileState | None]) -> None:
    """Note the states of files by name; None for one that is not right.

    Does nothing if that cannot be written, or a later version of k2 has written it.
    """
    path = note_path(folder)
    if not states or is_of_later_version(path, _SCHEMA_VERSION):
        return
    with suppress(OSError):
        known = _read(path)
        for name, state in states.items():
            key = _key(folder, name)
            if state is None:
                known.pop(key, None)
            else:
                known[key] = state
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, encode_json(_Note(known)))


def is_read(name: str) -> bool:
    """True for a file that loading reads, whose verification counts."""
    is_weight = name.endswith(".safetensors") and not name.startswith(".")
    return is_weight or name == INDEX_NAME or bool(supporting_files([name]))


def last_verified(folder: Path, names: Collection[str]) -> Verified | None:
    """Return the oldest of the last verifications of some files.

    None if one of them was never verified, or has changed since.
    """
    states = read_states(folder, names)
    if len(states) < len(names):
        return None
    if not all(state.is_of(folder / name) for name, state in states.items()):
        return None
    found = [Verified(state.time, state.by) for state in states.values()]
    return min(found, key=lambda each: each.time, default=None)
