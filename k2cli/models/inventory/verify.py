"""Verification of a model's files on this machine, without network access.

In the cache of the Hub library, the name of the data that a file links to is its digest on the
Hub: sha256 for large files, git's sha1 for small ones. Headers are compared with the lengths of
files, and the index with the tensors, for every folder. hashlib releases Python's interpreter
lock, so threads compute digests on all cores.
"""

from __future__ import annotations

import hashlib
import os
import re
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from k2cli.errors import K2Error
from k2cli.files import open_regular
from k2cli.models.checkpoint import read_checkpoint
from k2cli.models.layout import is_own
from k2cli.models.safetensors_header import read_safetensors_header

_CHUNK_BYTES = 2**20
_DIGEST = re.compile(r"[0-9a-f]{64}|[0-9a-f]{40}")

FileStatus = Literal["verified", "damaged", "no digest known"]
Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class FileResult:
    """Result for one file; ``reason`` says how it is damaged."""

    name: str
    nbytes: int
    status: FileStatus
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Verification:
    """Result for a folder; ``problems`` concern the checkpoint as a whole, such as its index."""

    folder: Path
    files: tuple[FileResult, ...]
    problems: tuple[str, ...] = ()

    @property
    def damaged(self) -> tuple[FileResult, ...]:
        """Files that are not what they must be."""
        return tuple(file for file in self.files if file.status == "damaged")


def verify_folder(folder: Path, progress: Progress = lambda done, total: None) -> Verification:
    """Verify all files of a checkpoint folder.

    Args:
        folder: a snapshot in the cache of the Hub library, or any checkpoint folder.
        progress: called in this thread with the bytes done and the total bytes.

    Raises:
        K2Error: if the folder cannot be listed.
    """
    try:
        paths = sorted(path for path in folder.rglob("*") if not path.is_dir())
    except OSError as error:
        raise K2Error(f"cannot read {folder}: {error.strerror}") from error
    own = [path for path in paths if is_own(path.relative_to(folder).parts[0])]
    sizes = {path: path.stat().st_size if path.exists() else 0 for path in own}
    total, done = sum(sizes.values()), 0
    results: list[FileResult] = []
    stop = threading.Event()
    pool = ThreadPoolExecutor(os.cpu_count() or 1)
    try:
        # The largest first, so that no core is left alone with a large file at the end.
        order = sorted(own, key=lambda path: -sizes[path])
        waiting = {pool.submit(_verify_file, folder, path, stop): path for path in order}
        for future in as_completed(waiting):
            results.append(future.result())
            done += sizes[waiting[future]]
            progress(done, total)
    finally:
        stop.set()  # after Ctrl-C, running threads end with their chunk
        pool.shutdown(wait=True, cancel_futures=True)
    results.sort(key=lambda result: result.name)
    problems = () if any(file.status == "damaged" for file in results) else _problems(folder)
    return Verification(folder, tuple(results), problems)


def _verify_file(folder: Path, path: Path, stop: threading.Event) -> FileResult:
    name = path.relative_to(folder).as_posix()
    try:
        expected = expected_digest(path)
        with os.fdopen(open_regular(path, follow_links=True), "rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            digest = _digest(file, size, expected, stop) if expected is not None else None
        if path.suffix == ".safetensors":
            read_safetensors_header(path)
    except FileNotFoundError:
        return FileResult(name, 0, "damaged", "its data are missing")
    except OSError as error:
        return FileResult(name, 0, "damaged", error.strerror or str(error))
    except K2Error as error:
        return FileResult(name, size, "damaged", error.message)
    if expected is None:
        return FileResult(name, size, "no digest known")
    if digest != expected:
        kind = "sha256" if len(expected) == 64 else "git sha1"
        return FileResult(name, size, "damaged", f"its {kind} is {digest}, not {expected}")
    return FileResult(name, size, "verified")


def expected_digest(path: Path) -> str | None:
    """Return the digest of a file on the Hub; None for a file that is not in the Hub's cache."""
    if not path.is_symlink():
        return None
    target = Path(os.readlink(path))
    is_blob = target.parent.name == "blobs" and _DIGEST.fullmatch(target.name)
    return target.name if is_blob else None


def _digest(file: object, size: int, expected: str, stop: threading.Event) -> str:
    digest = hashlib.sha256()
    if len(expected) == 40:
        # git's own name of the content; it guards against damage, not against an attacker
        digest = hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
    buffer = memoryview(bytearray(_CHUNK_BYTES))
    while not stop.is_set() and (count := file.readinto(buffer)):  # type: ignore[attr-defined]
        digest.update(buffer[:count])
    return digest.hexdigest()


def _problems(folder: Path) -> tuple[str, ...]:
    """Compare the index with the tensors, and the config with its form."""
    try:
        checkpoint = read_checkpoint(folder)
    except K2Error as error:
        return (error.message,)
    return checkpoint.warnings
