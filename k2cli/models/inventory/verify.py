"""Verification of a model's files on this machine, without network access.

The record of the download says which files there must be, with their hashes. Files that it does not
list have the hash that their name in the Hub's cache says, or none. Headers are compared with the
lengths of files, and the index with the tensors, for every folder.
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from k2cli.errors import K2Error
from k2cli.models.checkpoint import read_checkpoint
from k2cli.models.inventory.verified import FileState, note_states, state_of
from k2cli.models.layout import is_own
from k2cli.models.part import absent_files
from k2cli.models.safetensors_header import read_safetensors_header
from k2cli.models.sources.expected_files import (
    ExpectedFile,
    expected_file,
    has_content,
    header_damage,
    verify_file,
)
from k2cli.models.sources.snapshot_record import SnapshotRecord

_DIGEST = re.compile(r"[0-9a-f]{64}|[0-9a-f]{40}")
_SECONDS_BETWEEN_REPORTS = 0.2

FileStatus = Literal["verified", "repaired", "damaged", "missing", "not linked", "no digest known"]
"""``not linked``: its data are in the Hub's cache, but not in the model's folder."""

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class FileResult:
    """Result for one file; ``reason`` says what is wrong with it.

    ``expected`` is what is known about its content, and ``state`` that of the file that was read.
    """

    name: str
    nbytes: int
    status: FileStatus
    reason: str = ""
    expected: ExpectedFile | None = None
    state: FileState | None = None


@dataclass(frozen=True, slots=True)
class Verification:
    """Result for a folder; ``problems`` concern the checkpoint as a whole, such as its index."""

    folder: Path
    files: tuple[FileResult, ...]
    problems: tuple[str, ...] = ()

    @property
    def damaged(self) -> tuple[FileResult, ...]:
        """Files that are not what they must be, or not there."""
        wrong = ("damaged", "missing", "not linked")
        return tuple(file for file in self.files if file.status in wrong)


def verify_folder(
    folder: Path,
    record: SnapshotRecord | None = None,
    progress: Progress = lambda done, total: None,
) -> Verification:
    """Verify all files of a checkpoint folder, and note what was right.

    Args:
        folder: a snapshot in the cache of the Hub library, or any checkpoint folder.
        record: which files it must have; None if that is not known.
        progress: called in this thread with the bytes done and the total bytes.

    Raises:
        K2Error: if the folder cannot be listed.
    """
    expected = _expected_files(folder, record)
    sizes = {name: _bytes_to_read(folder, name, file) for name, file in expected.items()}
    counter, total = _Counter(), sum(sizes.values())
    results: list[FileResult] = []
    pool = ThreadPoolExecutor(os.cpu_count() or 1)
    try:
        # The largest first, so that no core is left alone with a large file at the end.
        order = sorted(expected, key=lambda name: -sizes[name])
        waiting = [
            pool.submit(_verify_file, folder, name, expected[name], counter) for name in order
        ]
        for future in _as_they_end(waiting, lambda: progress(counter.done_bytes, total)):
            results.append(future.result())
    finally:
        counter.stop.set()  # after Ctrl-C, running threads end with their piece
        pool.shutdown(wait=True, cancel_futures=True)
    return concluded(folder, record, results)


def concluded(
    folder: Path, record: SnapshotRecord | None, results: Iterable[FileResult]
) -> Verification:
    """Make the verification of a folder from the results for its files, and note what was right."""
    files = tuple(sorted(results, key=lambda result: result.name))
    found = Verification(folder, files)
    if not found.damaged and (record is None or record.whole):
        found = Verification(folder, files, _problems(folder))
    is_right = ("verified", "repaired")
    note_states(folder, {f.name: f.state if f.status in is_right else None for f in files})
    return found


def _expected_files(folder: Path, record: SnapshotRecord | None) -> dict[str, ExpectedFile | None]:
    """Return all files to verify: those that are there, and those that the record lists."""
    try:
        paths = sorted(path for path in folder.rglob("*") if not path.is_dir())
    except OSError as error:
        raise K2Error(f"cannot read {folder}: {error.strerror}") from error
    found: dict[str, ExpectedFile | None] = {}
    for path in paths:
        name = path.relative_to(folder)
        if is_own(name.parts[0]):
            found[name.as_posix()] = _named_by_hash(name.as_posix(), path)
    absent = absent_files(folder)
    listed = record.files if record is not None else ()
    return found | {file.name: file for file in listed if file.name not in absent}


def _named_by_hash(name: str, path: Path) -> ExpectedFile | None:
    """Return what the Hub's cache says about a file by the name of its data; None elsewhere."""
    if not path.is_symlink():
        return None
    target = Path(os.readlink(path))
    if target.parent.name != "blobs" or not _DIGEST.fullmatch(target.name):
        return None
    # Its size is known from its data alone.
    return expected_file(name, path.stat().st_size if path.exists() else 0, target.name)


def _bytes_to_read(folder: Path, name: str, expected: ExpectedFile | None) -> int:
    path = folder / name
    if expected is None or not path.exists():
        return 0
    return expected.nbytes if path.stat().st_size == expected.nbytes else 0


def _verify_file(
    folder: Path, name: str, expected: ExpectedFile | None, counter: _Counter
) -> FileResult:
    path = folder / name
    try:
        if expected is None:
            return _verify_header(path, name)
        state = state_of(path, expected.blob_name, "verify")
        damage = verify_file(path, expected, counter.add)
        if damage == "is missing":
            return _missing_file(folder, path, expected, counter)
        if damage is not None and header_damage(path, expected) is not None:
            # With the right hash its source has the same header: a problem of the checkpoint.
            damage = None if has_content(path, expected, counter.add) else damage
    except OSError as error:
        return FileResult(name, 0, "damaged", error.strerror or str(error), expected)
    if damage is not None:
        return FileResult(name, expected.nbytes, "damaged", damage, expected, state)
    return FileResult(name, expected.nbytes, "verified", "", expected, state)


def _verify_header(path: Path, name: str) -> FileResult:
    size = path.stat().st_size
    if path.suffix == ".safetensors":
        try:
            read_safetensors_header(path)
        except K2Error as error:
            return FileResult(name, size, "damaged", error.message)
    return FileResult(name, size, "no digest known")


def _missing_file(
    folder: Path, path: Path, expected: ExpectedFile, counter: _Counter
) -> FileResult:
    """Return the result for a file that is not in the folder; its data may be in the cache."""
    if folder.parent.name == "snapshots":
        blob = folder.parent.parent / "blobs" / expected.blob_name
        if blob.is_file() and verify_file(blob, expected, counter.add) is None:
            reason = "is not linked, although its data are here"
            return FileResult(expected.name, expected.nbytes, "not linked", reason, expected)
    reason = "has lost its data" if path.is_symlink() else "is missing"
    return FileResult(expected.name, expected.nbytes, "missing", reason, expected)


def _as_they_end(
    futures: list[Future[FileResult]], report: Callable[[], None]
) -> Iterator[Future[FileResult]]:
    """Yield futures as they end, and report several times a second meanwhile."""
    left = set(futures)
    while left:
        ended, left = wait(left, _SECONDS_BETWEEN_REPORTS, return_when="FIRST_COMPLETED")
        report()
        yield from ended


class _Counter:
    """Counter of the bytes that several threads have read."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.done_bytes = 0
        self.stop = threading.Event()

    def add(self, count: int) -> None:
        """Count bytes.

        Raises:
            KeyboardInterrupt: if the verification was interrupted; nobody sees it.
        """
        with self._lock:
            self.done_bytes += count
        if self.stop.is_set():
            raise KeyboardInterrupt


def _problems(folder: Path) -> tuple[str, ...]:
    """Compare the index with the tensors, and the config with its form."""
    try:
        checkpoint = read_checkpoint(folder)
    except K2Error as error:
        return (error.message,)
    return checkpoint.warnings
