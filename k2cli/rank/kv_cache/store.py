"""The prefix cache on disk, on one rank: blocks are written, read and removed by two threads.

The leader decides what is written, read and removed. The thread that computes copies arrays to and
from host memory and never waits for the disk. What the disk did is reported to the leader, which
uses a block only if every rank has its part of it.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import queue
import threading
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from k2cli import __version__
from k2cli.errors import K2Error
from k2cli.files import read_regular
from k2cli.prefix_folder import (
    PART_MARK,
    BlockFile,
    StoreNote,
    blocks_of,
    naming_secret,
    open_prefixes_directory,
    open_store,
)
from k2cli.protocol import (
    Assignment,
    BlocksFound,
    BlocksRead,
    BlockWritten,
    ForgetBlocks,
    OpenStore,
    ReadBlocks,
    StoreReport,
)
from k2cli.protocol.decisions import BlockName
from k2cli.rank.kv_cache.block_file import (
    HostArray,
    from_host,
    read_block,
    to_host,
    write_block,
)
from k2cli.rank.kv_cache.segments import Segment, form
from k2cli.stderr import say_on_stderr

if TYPE_CHECKING:
    from k2cli.sharding.stage import Stage

_OLD_PART_SECONDS = 600.0
_SIZE_SECONDS = 10.0
"""Between two looks at the size of the store, to which other runs may write as well."""
_MOST_CONFIG_BYTES = 2**24
_MOST_BLOCKS = 2**18
"""Of one store: 67 million tokens. The leader is told of all of them in one message."""


class BlockStore:
    """A rank's part of the prefix cache on disk."""

    def __init__(
        self, assignment: Assignment, layers: int, report: Callable[[StoreReport], None]
    ) -> None:
        """Call ``report`` from threads, with what the leader must know.

        Args:
            layers: the number of cache entries that this rank has.
        """
        self._assignment = assignment
        self._layers = layers
        self._rank = assignment.rank
        self._report = report
        self._folder = Path()
        self._mark = -1
        self._writing: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._reading: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._read: dict[int, list[list[HostArray]]] = {}
        self._lock = threading.Lock()
        self._failed = False
        self._limit_bytes = 0
        self._next_look = 0.0
        self.secret = b""
        """The secret of the names of blocks, on the leader, once its blocks are reported."""

    def open(self, decision: OpenStore) -> None:
        """Begin: start the threads, and report what is there."""
        for jobs in (self._writing, self._reading):
            threading.Thread(target=_carry_out, args=(jobs,), daemon=True).start()
        self._writing.put(lambda: self._open(decision))

    def _open(self, decision: OpenStore) -> None:
        found: list[BlockFile] = []
        self._limit_bytes = decision.limit_bytes
        try:
            root = open_prefixes_directory()
            self._folder = root / f"{decision.folder}-{self._rank}"
            self._make_folder()
            found = self._found()
            self._remove_others(root, decision.limit_bytes - sum(file.nbytes for file in found))
        except Exception as error:  # the start waits for the report
            self._switch_off(error)
        blocks = [(file.name, file.nbytes, file.used) for file in found]
        self._report(BlocksFound(self._rank, blocks, not self._failed))

    def _make_folder(self) -> None:
        if self._rank == 0:  # k2 cache clear removes it, and later runs must find what is stored
            self.secret = naming_secret(self.secret)
        model = _model_name(Path(self._assignment.model_path))
        note = StoreNote(model, self._rank, self._assignment.size)
        # The descriptor stays open: it marks the store as used.
        before, self._mark = self._mark, open_store(self._folder, note)
        if before >= 0:
            os.close(before)

    def _found(self) -> list[BlockFile]:
        """Return the complete blocks; remove what writers that were killed have left."""
        complete = []
        for file in blocks_of(self._folder):
            if _is_block(file.name):
                complete.append(file)
            elif PART_MARK in file.name and file.used < time.time() - _OLD_PART_SECONDS:
                (self._folder / file.name).unlink(missing_ok=True)
        complete.sort(key=lambda file: file.used, reverse=True)
        for file in complete[_MOST_BLOCKS:]:
            (self._folder / file.name).unlink(missing_ok=True)
        return complete[:_MOST_BLOCKS]

    def _remove_others(self, root: Path, left_bytes: int) -> None:
        """Remove blocks of this rank in other runs, oldest first, until they fit."""
        others = [
            (file, folder)
            for folder in root.glob(f"*-{self._rank}")
            if folder != self._folder and not folder.is_symlink()
            for file in blocks_of(folder)
        ]
        others.sort(key=lambda other: other[0].used)
        size = sum(file.nbytes for file, _ in others)
        for file, folder in others:
            if size <= left_bytes:
                return
            (folder / file.name).unlink(missing_ok=True)
            size -= file.nbytes

    def write(self, block: str, layers: list[Segment]) -> None:
        """Copy the caches of a block, and let them be written."""
        try:
            arrays = to_host(layers)
        except K2Error as error:
            self._report(BlockWritten(self._rank, block, error=error.message))
            return
        self._writing.put(lambda: self._write(block, arrays))

    def _write(self, block: str, arrays: list[HostArray]) -> None:
        if self._failed:
            self._report(BlockWritten(self._rank, block, error="switched off"))
            return
        try:
            try:
                size = write_block(self._folder / block, arrays)
            except FileNotFoundError:  # the folder was removed meanwhile: see remove_store
                self._make_folder()
                size = write_block(self._folder / block, arrays)
        except Exception as error:  # the leader waits for the report
            self._switch_off(error)
            self._report(BlockWritten(self._rank, block, error=str(error)))
        else:
            self._report(BlockWritten(self._rank, block, size))
            self._keep_size()

    def _keep_size(self) -> None:
        """Remove the oldest blocks if the store is too large: its leader may not know of all."""
        now = time.monotonic()
        if now < self._next_look:
            return
        self._next_look = now + _SIZE_SECONDS
        with contextlib.suppress(OSError):
            files = [file for file in blocks_of(self._folder) if _is_block(file.name)]
            left = sum(file.nbytes for file in files) - self._limit_bytes
            for file in sorted(files, key=lambda file: file.used):
                if left <= 0:
                    return
                (self._folder / file.name).unlink(missing_ok=True)
                left -= file.nbytes

    def _switch_off(self, error: Exception) -> None:
        if not self._failed:
            self._failed = True
            reason = repr(error)
            if isinstance(error, OSError):
                reason = error.strerror or str(error)
            say_on_stderr(f"rank {self._rank}: the prefix cache on disk is switched off: {reason}")

    def read(self, decision: ReadBlocks) -> None:
        """Let blocks be read."""
        self._reading.put(lambda: self._read_blocks(decision))

    def _read_blocks(self, decision: ReadBlocks) -> None:
        found: list[list[HostArray]] = []
        for block in decision.blocks:
            try:
                found.append(read_block(self._folder / block, self._layers))
            except FileNotFoundError:  # another run, or k2 cache clear, has removed it
                break
            except Exception as error:  # a request waits for the report
                reason = error.message if isinstance(error, K2Error) else str(error)
                say_on_stderr(
                    f"rank {self._rank}: a block of the prefix cache is removed: {reason}"
                )
                self._remove([block])
                break
        with self._lock:
            self._read[decision.reading] = found
        self._report(BlocksRead(self._rank, decision.reading, len(found)))

    def take(self, reading: int, count: int) -> list[list[Segment]]:
        """Return the first ``count`` blocks of a reading, each with its layers, and forget it."""
        with self._lock:
            found = self._read.pop(reading, [])
        return [from_host(arrays) for arrays in found[:count]]

    def forget(self, decision: ForgetBlocks) -> None:
        """Let blocks be removed."""
        self._writing.put(lambda: self._remove(decision.blocks))

    def touch(self, times: dict[str, float]) -> None:
        """Let the times of the last use of blocks be recorded."""
        self._writing.put(lambda: self._touch(times))

    def _touch(self, times: dict[str, float]) -> None:
        for block, used in times.items():
            with contextlib.suppress(OSError):
                os.utime(self._folder / block, (used, used), follow_symlinks=False)

    def _remove(self, blocks: list[str]) -> None:
        for block in blocks:
            with contextlib.suppress(OSError):
                (self._folder / block).unlink()


def _model_name(folder: Path) -> str:
    """Return how a user knows a model: the repository's name if it is in the Hub's cache."""
    repository = folder.parent.parent.name
    if folder.parent.name == "snapshots" and repository.startswith("models--"):
        return repository.removeprefix("models--").replace("--", "/")
    return folder.name


def _carry_out(jobs: queue.SimpleQueue[Callable[[], None]]) -> None:
    while True:
        jobs.get()()


def _is_block(name: str) -> bool:
    try:
        msgspec.convert(name, BlockName)
    except (msgspec.MsgspecError, UnicodeEncodeError):
        return False
    return True


def rank_identity(assignment: Assignment, stage: Stage) -> str:
    """Return a digest of what a rank's caches depend on, beside the run's placement.

    Weights of hundreds of gigabytes are not read for it: a file counts as the same if its name
    (in the Hub's cache a digest of its content), size and time of change are.
    """
    folder = Path(assignment.model_path)
    config = read_regular(folder / "config.json", _MOST_CONFIG_BYTES, follow_links=True)
    digest = hashlib.sha256(config)
    for path in sorted(folder.glob("*.safetensors")):
        found, real = path.stat(), path.resolve().name
        digest.update(f"{path.name} {real} {found.st_size} {found.st_mtime_ns}\n".encode())
    digest.update(f"{form(stage)} {__version__} {_version('mlx')} {_version('mlx-lm')}".encode())
    return digest.hexdigest()


def run_identity(assignment: Assignment, identities: list[str]) -> str:
    """Return the name of a run's stores: a digest of the placement and all ranks' identities."""
    parts = (
        assignment.size,
        assignment.strategy,
        assignment.layers,
        assignment.head,
        assignment.dtype,
        assignment.expansion_weight,
        identities,
    )
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""
