"""Folders outside k2's own stores to which k2 wrote a model, and the files that it wrote there.

k2 remembers each folder to which it quantized, downloaded or received a model, so that it can list
it and remove those files again. It does so in a folder of its own, since these may be the user's.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Literal

import msgspec

from k2cli.errors import K2Error
from k2cli.files import (
    decode_json,
    encode_json,
    is_of_later_version,
    read_regular,
    write_atomically,
)
from k2cli.models.sources.cache_layout import FolderPlace
from k2cli.models.sources.expected_files import ExpectedFile, has_content
from k2cli.models.sources.file_names import is_safe_name
from k2cli.models.sources.snapshot_record import recorded_snapshot
from k2cli.settings import data_directory

Origin = Literal["quantize", "download", "push"]
_SCHEMA_VERSION = 1
_LIMIT_BYTES = 16 * 2**20
_SMALL_BYTES = 2**26
_TICK_NS = 2 * 10**9
"""Precision of the times of files on exFAT."""


class Stamp(msgspec.Struct, frozen=True):
    """Size and time of change of a file that k2 wrote, by which it is known again."""

    bytes: int
    modified_ns: int


class KnownFolder(msgspec.Struct, frozen=True):
    """A folder to which k2 wrote a model: by which command, from what, and which files."""

    path: str
    origin: Origin
    created: float = 0.0
    source: str = ""
    recipe: str = ""
    files: dict[str, Stamp] = {}
    schema_version: int = _SCHEMA_VERSION


def _folder() -> Path:
    return data_directory() / "known-folders"


def folder_key(path: Path) -> str:
    """Return a name for a folder that two folders do not share."""
    return hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:16]


def _entry(path: Path) -> Path:
    return _folder() / f"{folder_key(path)}.json"


def remember_folder(
    folder: Path,
    origin: Origin,
    files: Mapping[str, Stamp] | None = None,
    *,
    source: str = "",
    recipe: str = "",
) -> None:
    """Remember that k2 writes a model to a folder; nothing if that cannot be noted.

    A note of a later version of k2 stays.

    Args:
        files: those that it wrote or is about to write; they are added to those known before.
    """
    with suppress(OSError, K2Error):
        if is_of_later_version(_entry(folder), _SCHEMA_VERSION):
            return
        earlier = known_folder(folder)
        every = {**(earlier.files if earlier is not None else {}), **(files or {})}
        path = str(folder.resolve())
        known = KnownFolder(path, origin, time.time(), source, recipe, every)
        _folder().mkdir(parents=True, exist_ok=True)
        write_atomically(_entry(folder), encode_json(known))


def forget_folder(folder: Path) -> None:
    """Forget a folder that was removed."""
    _entry(folder).unlink(missing_ok=True)


def known_folder(folder: Path) -> KnownFolder | None:
    """Return what is remembered of a folder; None if nothing is."""
    known = _read(_entry(folder))
    return known if known is not None and known.path == str(folder.resolve()) else None


def known_folders() -> list[KnownFolder]:
    """Return the remembered folders, in the order of their paths.

    One that does not exist may be on a disk that is not mounted, so it is not forgotten.
    """
    found = [known for path in _folder().glob("*.json") if (known := _read(path)) is not None]
    return sorted(found, key=lambda known: known.path)


def _read(entry: Path) -> KnownFolder | None:
    with suppress(OSError, msgspec.DecodeError):
        known = decode_json(read_regular(entry, _LIMIT_BYTES), KnownFolder)
        fits = known.schema_version == _SCHEMA_VERSION and Path(known.path).is_absolute()
        if fits and all(map(is_safe_name, known.files)):
            return known
    return None


def stamps_of(folder: Path) -> dict[str, Stamp]:
    """Return size and time of change of each file of a folder that k2 has made."""
    found = {}
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            status = path.stat()
            name = path.relative_to(folder).as_posix()
            found[name] = Stamp(status.st_size, status.st_mtime_ns)
    return found


def own_files(folder: Path) -> tuple[str, ...]:
    """Return the names of the files of a folder that k2 wrote and nobody has changed since."""
    known, record = known_folder(folder), recorded_snapshot(folder)
    stamps = known.files if known is not None else {}
    own = [name for name, stamp in stamps.items() if _is_as(folder / name, stamp)]
    if record is not None and record.written_by == "k2":
        own += [file.name for file in record.files if _is_fetched(folder, file, record.commit)]
    return tuple(dict.fromkeys(own))


def _is_fetched(folder: Path, file: ExpectedFile, commit: str) -> bool:
    """True if a file of a download is as it was fetched.

    Small files, which users edit, are read if it is not noted that they are. Of weights that no
    tool has noted, only the size is compared. A file of another size is one that the user had
    there before an interrupted download.
    """
    if not _is_as(folder / file.name, Stamp(file.nbytes, 0)):
        return False
    place = FolderPlace(file, folder, commit)
    noted = place.noted_hash()
    if noted == file.blob_name and not place.is_changed():
        return True
    if file.nbytes > _SMALL_BYTES:
        return noted is None
    with suppress(OSError):
        return has_content(folder / file.name, file, lambda count: None)
    return False


def may_remove(folder: Path) -> bool:
    """True if k2 wrote files of a folder that are there, or that a removal has taken already."""
    known, record = known_folder(folder), recorded_snapshot(folder)
    own = own_files(folder)
    if known is None or own:
        return bool(own)
    fetched = record.files if record is not None and record.written_by == "k2" else ()
    names = {*known.files, *(file.name for file in fetched)}
    return bool(names) and not any(os.path.lexists(folder / name) for name in names)


def _is_as(path: Path, stamp: Stamp) -> bool:
    if not path.is_file() or path.is_symlink():
        return False
    status = path.stat()
    same_time = abs(status.st_mtime_ns - stamp.modified_ns) <= _TICK_NS or not stamp.modified_ns
    return status.st_size == stamp.bytes and same_time


def notes_of(folder: Path) -> Iterable[Path]:
    """Return the folders in which download tools keep notes on a model's folder, and k2's."""
    base = folder / ".cache"
    return base / "huggingface" / "download", base / "huggingface" / "trees", base / "k2"
