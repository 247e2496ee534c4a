"""Folders outside k2's own stores that have a model, and which of their files k2 wrote.

k2 remembers each folder to which it quantized, downloaded or received a model, so that it can list
it. A mark inside a folder that k2 made names the files that may be removed again.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Literal

import msgspec

from k2cli.errors import K2Error
from k2cli.files import decode_json, encode_json, read_regular, write_atomically
from k2cli.models.sources.file_names import is_safe_name
from k2cli.models.sources.snapshot_record import recorded_snapshot
from k2cli.settings import data_directory

Origin = Literal["quantize", "download", "push"]
_LIMIT_BYTES = 16 * 2**20
_MARK = Path(".cache", "k2", "made.json")


class KnownFolder(msgspec.Struct, frozen=True):
    """A folder to which k2 wrote a model, and by which command."""

    path: str
    origin: Origin
    created: float = 0.0
    schema_version: int = 1


class MadeBy(msgspec.Struct, frozen=True):
    """Mark in a folder that k2 made: the command, its source, and the names of the files."""

    origin: Origin
    files: tuple[str, ...]
    source: str = ""
    recipe: str = ""
    created: float = 0.0
    schema_version: int = 1


def _folder() -> Path:
    return data_directory() / "known-folders"


def _entry(path: Path) -> Path:
    return _folder() / f"{hashlib.sha256(os.fsencode(path)).hexdigest()[:16]}.json"


def remember_folder(folder: Path, origin: Origin) -> None:
    """Remember that a folder has a model; without effect if k2's own folder cannot be written."""
    path = folder.resolve()
    text = os.fsdecode(os.fsencode(path))
    known = KnownFolder(text, origin, time.time())
    with suppress(OSError, K2Error):
        _folder().mkdir(parents=True, exist_ok=True)
        write_atomically(_entry(path), encode_json(known))


def forget_folder(folder: Path) -> None:
    """Forget a folder that was removed."""
    _entry(folder.resolve()).unlink(missing_ok=True)


def known_folders() -> list[KnownFolder]:
    """Return the remembered folders, in the order of their paths.

    One that does not exist may be on a disk that is not mounted, so it is not forgotten.
    """
    found = []
    for entry in _folder().glob("*.json"):
        with suppress(OSError, msgspec.DecodeError):
            known = decode_json(read_regular(entry, _LIMIT_BYTES), KnownFolder)
            if Path(known.path).is_absolute():
                found.append(known)
    return sorted(found, key=lambda known: known.path)


def mark_made(folder: Path, origin: Origin, source: str, recipe: str) -> None:
    """Write the mark into a folder whose files k2 has all written.

    Raises:
        OSError: if it cannot be written.
    """
    files = sorted(
        path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()
    )
    mark = MadeBy(origin, tuple(files), source, recipe, time.time())
    (folder / _MARK).parent.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / _MARK, encode_json(mark))


def mark_of(folder: Path) -> MadeBy | None:
    """Read the mark of a folder that k2 made; None if it has none."""
    try:
        mark = decode_json(read_regular(folder / _MARK, _LIMIT_BYTES), MadeBy)
    except (OSError, msgspec.DecodeError):
        return None
    return mark if all(map(is_safe_name, mark.files)) else None


def own_files(folder: Path) -> tuple[str, ...]:
    """Return the names of the files of a folder that k2 wrote: quantized, or downloaded to it."""
    if (mark := mark_of(folder)) is not None:
        return mark.files
    record = recorded_snapshot(folder)
    if record is None or record.written_by != "k2":
        return ()
    # A file of another size is one that the user had there before an interrupted download.
    sizes = {file.name: file.nbytes for file in record.files}
    return tuple(name for name, size in sizes.items() if _size(folder / name) == size)


def _size(path: Path) -> int | None:
    return path.lstat().st_size if path.is_file() and not path.is_symlink() else None


def notes_of(folder: Path) -> Iterable[Path]:
    """Return the folders in which download tools keep notes on a model's folder, and k2's."""
    base = folder / ".cache"
    return base / "huggingface" / "download", base / "huggingface" / "trees", base / "k2"
