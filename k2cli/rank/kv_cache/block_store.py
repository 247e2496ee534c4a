"""The prefix cache on disk, on one rank: blocks are written, read and removed by two threads.

The leader decides what is written, read and removed. The thread that computes copies arrays to and
from host memory and never waits for the disk. What the disk did is reported to the leader, which
uses a block only if every rank has its part of it.
"""

from __future__ import annotations

import contextlib
import functools
import os
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec

from k2cli.errors import K2Error
from k2cli.files import matching
from k2cli.prefix_folder import (
    PART_MARK,
    BlockFile,
    StoreNote,
    blocks_of,
    change_times,
    lock_state,
    naming_secret,
    open_prefixes_directory,
    open_store,
    remove_if_empty,
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
from k2cli.rank.kv_cache.segments import Segment
from k2cli.stderr import say_on_stderr
from k2cli.units import SURROGATE

STEP_SECONDS = 1e-6
"""Between the recorded uses of the blocks of a prompt: the later ones are removed first."""
_OLD_PART_SECONDS = 600.0
_SIZE_SECONDS = 10.0
"""Between two counts of all blocks while no change of another run is seen."""
_COUNT_SHARE = 0.1
"""The most of the time of the writing thread that counts take beside another run that writes."""
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
        self._limit_bytes = 0
        # Known to the writing thread alone: the sizes of this store's blocks, and those of this
        # rank in other stores, the least recently used first.
        self._own: dict[str, int] = {}
        self._own_bytes = 0
        self._others: deque[tuple[Path, int]] = deque()
        self._others_bytes = 0
        self._writing: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._reading: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._read: dict[int, list[list[HostArray]]] = {}
        self._lock = threading.Lock()
        self._failed = False
        self._next_count, self._earliest_count = 0.0, 0.0
        self._seen: dict[str, int] = {}
        self._is_outdated = False
        self.secret = b""
        """On the leader: what the names of blocks depend on, once its blocks are reported."""
        self.problem = ""
        """Why nothing is written any more."""
        self.removals = 0
        """How often the folder was removed by others, such as ``k2 cache clear``."""

    def open(self, decision: OpenStore) -> None:
        """Begin: start the threads, and report what is there."""
        for jobs in (self._writing, self._reading):
            threading.Thread(target=_carry_out, args=(jobs,), daemon=True).start()
        self._writing.put(lambda: self._open(decision))

    def _open(self, decision: OpenStore) -> None:
        found: list[BlockFile] = []
        self._limit_bytes = decision.limit_bytes
        try:
            self._folder = open_prefixes_directory() / f"{decision.folder}-{self._rank}"
            self._make_folder()
            found = self._found()
            for file in found:
                self._count(file.name, file.nbytes)
            self._find_others()
            self._make_room(0)
            self._note_changes()
        except Exception as error:  # the leader waits for the report
            found = []
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

    def _make_folder_again(self) -> None:
        """Make the folder that was removed meanwhile: see ``remove_store``."""
        self._make_folder()
        self._own, self._own_bytes = {}, 0
        self.removals += 1

    def _is_removed(self) -> bool:
        """True if the folder is not the one that this rank has marked as used."""
        try:
            return not os.path.samestat(lock_state(self._folder), os.fstat(self._mark))
        except FileNotFoundError:
            return True

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

    def _count(self, block: str, nbytes: int) -> None:
        """Note the size of one of this store's blocks, 0 if it is not there any more."""
        self._own_bytes += nbytes - self._own.pop(block, 0)
        if nbytes:
            self._own[block] = nbytes

    def _find_others(self) -> None:
        """Find the blocks of this rank in other stores: they count in its limit, too.

        Stores that have none are removed.
        """
        others = []
        for folder in self._stores():
            if folder != self._folder:
                remove_if_empty(folder)
                others += [
                    (file.used, folder / file.name, file.nbytes) for file in blocks_of(folder)
                ]
        self._others = deque((path, nbytes) for _, path, nbytes in sorted(others))
        self._others_bytes = sum(nbytes for _, nbytes in self._others)

    def _stores(self) -> list[Path]:
        """Return the stores of this rank, of all models."""
        found = matching(self._folder.parent, f"*-{self._rank}")
        return [folder for folder in found if not folder.is_symlink()]

    def _note_changes(self) -> bool:
        """Note when blocks were last added or removed; return True if that was since the last call.

        Called after each change of its own, it tells those of other runs.
        """
        before = self._seen
        with contextlib.suppress(OSError):
            self._seen = change_times(self._stores())
        return self._seen != before

    @contextlib.contextmanager
    def _own_changes(self) -> Iterator[None]:
        """Remove blocks in the body: that is no change of another run, but what was before is."""
        self._is_outdated |= self._note_changes()
        yield
        self._note_changes()

    def _make_room(self, more_bytes: int) -> None:
        """Remove blocks of other stores, oldest first, until they fit beside this one's."""
        left = self._limit_bytes - self._own_bytes - more_bytes
        while self._others and self._others_bytes > left:
            path, nbytes = self._others.popleft()
            path.unlink(missing_ok=True)
            self._others_bytes -= nbytes

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
            if self._is_removed():
                self._make_folder_again()
            size = sum(len(array.data) for array in arrays)
            with contextlib.suppress(OSError):
                self._look_at_others()
            with self._own_changes():
                with contextlib.suppress(OSError):
                    self._make_own_room(size)
                self._make_room(size)
            try:
                size = self._write_file(self._folder / block, arrays)
            except FileNotFoundError:  # removed at this very moment
                self._make_folder_again()
                size = self._write_file(self._folder / block, arrays)
        except Exception as error:  # the leader waits for the report
            self._switch_off(error)
            self._report(BlockWritten(self._rank, block, error=str(error)))
        else:
            self._count(block, size)
            self._report(BlockWritten(self._rank, block, size))

    def _write_file(self, path: Path, arrays: list[HostArray]) -> int:
        """Write a block, and note if another run has changed something meanwhile."""
        size, undisturbed = write_block(path, arrays)
        self._is_outdated |= not undisturbed
        self._seen[str(path.parent)] = path.parent.stat().st_mtime_ns
        return size

    def _look_at_others(self) -> None:
        """Count all blocks again if other runs have changed something, and now and then anyway."""
        self._is_outdated |= self._note_changes()
        now = time.monotonic()
        if now < (self._earliest_count if self._is_outdated else self._next_count):
            return
        self._is_outdated = False
        self._own = {
            file.name: file.nbytes for file in blocks_of(self._folder) if PART_MARK not in file.name
        }
        self._own_bytes = sum(self._own.values())
        self._find_others()
        after = time.monotonic()
        self._next_count = after + _SIZE_SECONDS
        self._earliest_count = after + (after - now) * (1 / _COUNT_SHARE - 1)

    def _make_own_room(self, more_bytes: int) -> None:
        """Remove the oldest of this store's blocks: its leader does not know of all of them.

        Those of another run of the model are not known to it, and it cannot know of theirs.
        """
        if self._own_bytes + more_bytes <= self._limit_bytes:
            return
        for file in sorted(blocks_of(self._folder), key=lambda file: file.used):
            if self._own_bytes + more_bytes <= self._limit_bytes:
                return
            if _is_block(file.name):
                (self._folder / file.name).unlink(missing_ok=True)
                self._count(file.name, 0)

    def _switch_off(self, error: Exception) -> None:
        if not self._failed:
            self._failed = True
            reason = repr(error)
            if isinstance(error, OSError):
                reason = error.strerror or str(error)
            self.problem = reason
            say_on_stderr(f"rank {self._rank}: the prefix cache on disk is switched off: {reason}")

    def read(self, decision: ReadBlocks) -> None:
        """Let blocks be read."""
        self._reading.put(lambda: self._read_blocks(decision))

    def _read_blocks(self, decision: ReadBlocks) -> None:
        found: list[list[HostArray]] = []
        for index, block in enumerate(decision.blocks):
            try:
                found.append(read_block(self._folder / block, self._layers))
                self._touch({block: decision.used - index * STEP_SECONDS})
            except FileNotFoundError:  # another run, or k2 cache clear, has removed it
                break
            except Exception as error:  # a request waits for the report
                reason = error.message if isinstance(error, K2Error) else str(error)
                say_on_stderr(
                    f"rank {self._rank}: a block of the prefix cache is removed: {reason}"
                )
                self._writing.put(functools.partial(self._remove, [block]))
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
        with self._own_changes():
            for block in blocks:
                with contextlib.suppress(OSError):
                    (self._folder / block).unlink()
                self._count(block, 0)


def _model_name(folder: Path) -> str:
    """Return how a user knows a model: the repository's name if it is in the Hub's cache."""
    repository = folder.parent.parent.name
    if folder.parent.name == "snapshots" and repository.startswith("models--"):
        return repository.removeprefix("models--").replace("--", "/")
    return SURROGATE.sub("\ufffd", folder.name)


def _carry_out(jobs: queue.SimpleQueue[Callable[[], None]]) -> None:
    while True:
        jobs.get()()


def _is_block(name: str) -> bool:
    try:
        msgspec.convert(name, BlockName)
    except (msgspec.MsgspecError, UnicodeEncodeError):
        return False
    return True
