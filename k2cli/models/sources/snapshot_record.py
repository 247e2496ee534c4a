"""Record of a downloaded revision beside the model: its files with hashes, for checks offline.

k2 writes it for its own downloads. For downloads of huggingface_hub, what that library keeps on
disk says the same: its list of the repository's files, or else the names of the cache's blobs.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import msgspec

from k2cli.errors import K2Error
from k2cli.files import (
    decode_json,
    encode_json,
    is_of_later_version,
    read_regular,
    write_atomically,
)
from k2cli.models.checkpoint import read_index
from k2cli.models.layout import INDEX_NAME, choose_weight_files, supporting_files
from k2cli.models.sources.expected_files import ExpectedFile, expected_file
from k2cli.models.sources.file_names import is_safe_name

SCHEMA_VERSION = 1
_MAX_RECORD_BYTES = 50_000_000
_COMMIT_LETTERS = 200


class SnapshotRecord(msgspec.Struct, frozen=True):
    """The files of one revision that were chosen for a download.

    ``whole`` is False if the user left out files that loading reads. ``written_by`` says whose
    knowledge it is.
    """

    source: Literal["hub", "modelscope", "folder", "unknown"]
    repo: str
    revision: str
    commit: str
    files: tuple[ExpectedFile, ...]
    whole: bool = True
    written_by: Literal["k2", "huggingface_hub"] = "k2"
    schema_version: int = SCHEMA_VERSION


def record_path(folder: Path) -> Path:
    """Return the record's path for a model's folder: in the Hub library's cache, or another."""
    if folder.parent.name == "snapshots":
        return folder.parent.parent / ".k2" / f"{folder.name}.json"
    return folder / ".cache" / "k2" / "snapshot.json"


def write_record(folder: Path, record: SnapshotRecord) -> None:
    """Write the record for a folder, and what an earlier download of the same commit recorded.

    One of a later version of k2 stays, which may say more than this version understands.

    Raises:
        OSError: if it cannot be written.
    """
    if is_of_later_version(record_path(folder), SCHEMA_VERSION):
        return
    earlier = _read_own(folder)
    if earlier is not None and (earlier.repo, earlier.commit) == (record.repo, record.commit):
        files = {file.name: file for file in (*earlier.files, *record.files)}
        record = msgspec.structs.replace(
            record,
            files=tuple(files[name] for name in sorted(files)),
            whole=earlier.whole or record.whole,
        )
    path = record_path(folder)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, encode_json(record))


def recorded_snapshot(folder: Path) -> SnapshotRecord | None:
    """Return what is known on this machine about the files that a folder must have.

    None if neither k2 nor huggingface_hub recorded anything, such as for a converted model.
    """
    return _read_own(folder) or _read_library_list(folder) or _read_blob_names(folder)


def begun_commit(repository: Path, revision: str) -> str:
    """Return the commit of the last download of a branch or tag that began; "" if there is none.

    A download sets its branch in the Hub library's cache at its end, and writes its record before.

    Args:
        repository: the folder of a repository in that cache.
    """
    found = []
    with contextlib.suppress(OSError):
        for path in (repository / ".k2").glob("*.json"):
            record = _read_own(repository / "snapshots" / path.stem)
            if record is not None and (record.revision, record.commit) == (revision, path.stem):
                found.append((path.stat().st_mtime, record.commit))
    return max(found)[1] if found else ""


def _read_own(folder: Path) -> SnapshotRecord | None:
    try:
        record = decode_json(read_regular(record_path(folder), _MAX_RECORD_BYTES), SnapshotRecord)
    except (OSError, msgspec.DecodeError):
        return None
    known = all(is_safe_name(file.name) and file.blob_name for file in record.files)
    return record if known and record.schema_version == SCHEMA_VERSION else None


class _ListedFile(msgspec.Struct, frozen=True):
    size: int
    blob_id: str
    lfs_sha256: str | None = None


class _LibraryList(msgspec.Struct, frozen=True):
    format_version: int
    files: dict[str, _ListedFile]


def _read_library_list(folder: Path) -> SnapshotRecord | None:
    """Read the list that huggingface_hub kept; only those files of it that k2 would choose."""
    if folder.parent.name == "snapshots":
        trees, commit = folder.parent.parent / "trees", folder.name
    else:
        trees, commit = folder / ".cache" / "huggingface" / "trees", _commit_of(folder)
    try:
        listed = decode_json(
            read_regular(trees / f"{commit}.json", _MAX_RECORD_BYTES), _LibraryList
        )
    except (OSError, msgspec.DecodeError):
        return None
    if listed.format_version != 1:
        return None
    found = {
        name: file
        for name, entry in listed.files.items()
        if is_safe_name(name)
        and (file := expected_file(name, entry.size, entry.lfs_sha256 or entry.blob_id))
    }
    return _record(folder, commit, found)


def _commit_of(folder: Path) -> str:
    """Return the commit in the library's notes on the files of a folder; "" if there are none."""
    notes = folder / ".cache" / "huggingface" / "download" / "config.json.metadata"
    with contextlib.suppress(OSError, UnicodeDecodeError):
        text = read_regular(notes, 10_000).decode().partition("\n")[0].strip()
        return text if is_safe_name(text) and "/" not in text else ""
    return ""


def _read_blob_names(folder: Path) -> SnapshotRecord | None:
    """Take the hashes from the names of the blobs that a snapshot's links lead to.

    The sizes are those of the blobs themselves, since nothing else is known about them.
    """
    if folder.parent.name != "snapshots":
        return None
    found = dict(_linked_files(folder))
    return _record(folder, folder.name, found) if found else None


def _linked_files(folder: Path) -> Iterator[tuple[str, ExpectedFile]]:
    for parent, _, names in os.walk(folder):
        for each in names:
            path = os.path.join(parent, each)
            try:
                blob, found = os.readlink(path), os.stat(path)
            except OSError:  # no link, or a broken one
                continue
            name = path[len(str(folder)) + 1 :]
            if stat.S_ISREG(found.st_mode) and (
                file := expected_file(name, found.st_size, os.path.basename(blob))
            ):
                yield name, file


def _record(folder: Path, commit: str, found: Mapping[str, ExpectedFile]) -> SnapshotRecord | None:
    """Make the record of the files that loading reads; of what is there if that is unclear."""
    try:
        weights = choose_weight_files(found, _index_of(folder), str(folder)).names
    except K2Error:
        weights = tuple(name for name in found if name.endswith(".safetensors"))
    names = {*supporting_files(found), *weights}
    names |= {INDEX_NAME} & found.keys()
    storage = folder.parent.parent.name if folder.parent.name == "snapshots" else ""
    return SnapshotRecord(
        source="hub" if storage else "unknown",
        repo=storage.removeprefix("models--").replace("--", "/"),
        revision=commit,
        commit=commit[:_COMMIT_LETTERS],
        files=tuple(found[name] for name in sorted(names) if name in found),
        written_by="huggingface_hub",
    )


def _index_of(folder: Path) -> Any:
    return read_index(folder)
