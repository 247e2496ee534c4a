"""Download of files by several streams: which range is next, retries, limits, and what to report.

The thread of the caller decides about files: it takes their locks, opens and ends them, and reports
progress. Streams are threads that fetch ranges. A stream prefers a file that no other one works on,
so that bytes arrive in order and are hashed as they come; at the end several share a file.
"""

from __future__ import annotations

import contextlib
import os
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from k2cli.errors import K2Error
from k2cli.files import unwritable
from k2cli.models.sources.byte_source import ByteSource
from k2cli.models.sources.expected_files import ExpectedFile
from k2cli.models.sources.partial_file import PartialFile
from k2cli.models.sources.range_stream import (
    DownloadOptions,
    RangeStream,
    RateLimit,
    RetiredError,
    SharedState,
)

_LEAST_RANGE_BYTES, _MOST_RANGE_BYTES = 4 * 2**20, 256 * 2**20
"""Bounds of a range: what is left of a file is divided among the streams, within these."""
_SMALL_BYTES = 32 * 2**20
_SECONDS_BETWEEN_REPORTS = 0.2
_SECONDS_BETWEEN_LOCK_TRIES = 0.3
_END_SECONDS = 3.0
"""Time that streams have to write what they have received, at the end or after Ctrl-C."""


@dataclass(frozen=True, slots=True)
class FileProgress:
    """Bytes of one file that are there."""

    name: str
    done_bytes: int
    total_bytes: int


@dataclass(frozen=True, slots=True)
class DownloadProgress:
    """State of a download. ``received_bytes`` and ``seconds`` are those of this run.

    ``files`` are those being downloaded; ``note`` says what it waits for, if it waits.
    """

    done_bytes: int
    total_bytes: int
    received_bytes: int
    seconds: float
    files: tuple[FileProgress, ...] = ()
    note: str = ""


@dataclass(frozen=True, slots=True)
class FileFinished:
    """A file that was verified and is at ``path``. ``received`` is False if another run did it."""

    file: ExpectedFile
    path: Path
    received: bool


class Place(Protocol):
    """Target of one file on this machine."""

    @property
    def file(self) -> ExpectedFile:
        """The file."""

    @property
    def partial(self) -> Path:
        """Path of its partial content."""

    @property
    def journal(self) -> Path:
        """Path of its journal."""

    def try_lock(self) -> contextlib.ExitStack | None:
        """Take the lock of the file; None if another process or file of this one has it."""

    def find(self) -> Path | None:
        """Return the file's path if it is there, perhaps after linking content that is there."""

    def put(self) -> Path:
        """Move the verified partial content to its place, and return the path of the file."""


OnDownloadEvent = Callable[[DownloadProgress | FileFinished], None]


def _turn(nbytes: int) -> tuple[bool, int]:
    """Return the key that sorts files by when they are begun."""
    return nbytes > _SMALL_BYTES, -nbytes


@dataclass(slots=True)
class _Active:
    place: Place
    source: ByteSource
    content: PartialFile
    lock: contextlib.ExitStack
    streams: int = 0
    ranged: bool = True
    ended: bool = False


class ParallelDownload:
    """One download of files into their places; ``run`` does it."""

    def __init__(
        self,
        places: Sequence[tuple[Place, ByteSource]],
        options: DownloadOptions,
        on_event: OnDownloadEvent,
    ) -> None:
        self._options, self._on_event = options, on_event
        self._folder = places[0][0].partial.parent if places else Path()
        # Config, tokenizer and index first: an interrupted download can be planned and described
        # with them. Then large files: what is left at the end is shared out more evenly.
        self._waiting = deque(sorted(places, key=lambda each: _turn(each[0].file.nbytes)))
        self._all_begun = False
        self._total_bytes = sum(place.file.nbytes for place, _ in places)
        self._active: list[_Active] = []
        self._condition = threading.Condition()
        self._happened: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()
        self._shared = SharedState(RateLimit(options.bytes_per_second))
        self._finished_bytes, self._note = 0, ""
        self._wrong_hashes: dict[str, int] = {}
        self._streams_left = 0
        self._hashers = ThreadPoolExecutor(
            max(1, min(4, os.cpu_count() or 1)), thread_name_prefix="k2-hash"
        )

    def run(self) -> None:
        """Transfer all files.

        Raises:
            K2Error: if a file cannot be fetched or written, or is damaged at its source.
            KeyboardInterrupt: after the streams have written what they had.
        """
        streams = [
            threading.Thread(target=self._stream, name=f"k2-stream-{number}", daemon=True)
            for number in range(self._options.streams)
        ]
        self._streams_left = len(streams)
        started = reported = time.monotonic()
        try:
            for stream in streams:
                stream.start()
            while self._active or self._waiting:
                self._begin_files()
                with self._condition:
                    self._all_begun = True
                    self._condition.notify_all()
                self._wait()
                self._end_files()
                if time.monotonic() - reported >= _SECONDS_BETWEEN_REPORTS:
                    reported = time.monotonic()
                    self._report(reported - started)
            self._report(time.monotonic() - started)
        finally:
            self._end(streams)

    # --- the caller's thread: files ---------------------------------------------------------------

    def _begin_files(self) -> None:
        """Open files as long as streams have none of their own; skip what others are fetching."""
        for _ in range(len(self._waiting)):
            if sum(not each.content.is_hashed() for each in self._active) >= self._options.streams:
                return
            place, source = self._waiting.popleft()
            lock = self._lock(place)
            if lock is None:
                self._waiting.append((place, source))
                continue
            try:
                found = place.find()
            except BaseException:
                lock.close()
                raise
            if found is None:
                self._begin(place, source, lock)
                continue
            lock.close()
            self._finished(place, found, received=False)

    def _lock(self, place: Place) -> contextlib.ExitStack | None:
        try:
            return place.try_lock()
        except OSError as error:
            raise unwritable(error, place.partial) from error

    def _begin(self, place: Place, source: ByteSource, lock: contextlib.ExitStack) -> None:
        try:
            content = PartialFile(place.file, place.partial, place.journal, self._hash)
        except OSError as error:
            lock.close()
            raise unwritable(error, place.partial) from error
        with self._condition:
            self._active.append(_Active(place, source, content, lock))
            self._condition.notify_all()
        content.start()
        self._happened.put(None)  # an empty file is complete already

    def _hash(self, work: Callable[[], None]) -> None:
        def hash_and_tell() -> None:
            try:
                work()
            except BaseException as error:
                self._happened.put(error)
                return
            with self._condition:
                self._condition.notify_all()  # what was damaged is missing again
            self._happened.put(None)

        with contextlib.suppress(RuntimeError):  # the download is ending
            self._hashers.submit(hash_and_tell)

    def _wait(self) -> None:
        """Wait until something may have changed.

        Raises:
            BaseException: the one that a stream ended with.
        """
        if not self._active and not self._waiting:
            return
        seconds = _SECONDS_BETWEEN_REPORTS if self._active else _SECONDS_BETWEEN_LOCK_TRIES
        with contextlib.suppress(queue.Empty):
            error = self._happened.get(timeout=seconds)
            while True:
                if error is not None:
                    raise error
                error = self._happened.get_nowait()

    def _end_files(self) -> None:
        for active in list(self._active):
            if not active.content.is_hashed():
                continue
            with self._condition:
                if active.streams:
                    continue
                self._active.remove(active)
                self._all_begun = not self._waiting
            self._end_file(active)

    def _end_file(self, active: _Active) -> None:
        """Put a complete file in its place, or begin it anew if its hash is wrong."""
        place, name = active.place, active.place.file.name
        try:
            if active.content.is_right():
                active.content.close()
                active.ended = True
                path = place.put()
                self._finished(place, path, received=True)
                return
            active.content.close()
            active.ended = True
            place.partial.unlink(missing_ok=True)
            place.journal.unlink(missing_ok=True)
        except OSError as error:
            raise unwritable(error, place.partial) from error
        finally:
            if not active.ended:
                active.content.close()
            active.lock.close()
        failures = self._wrong_hashes[name] = self._wrong_hashes.get(name, 0) + 1
        if failures > 2:
            raise K2Error(
                f"{name} arrived {failures} times with another hash than {place.file.blob_name}",
                "the source, or something on the way, changes it: try another mirror (HF_ENDPOINT)",
            )
        self._note = f"{name} arrived damaged, it is fetched again"
        self._waiting.append((place, active.source))

    def _finished(self, place: Place, path: Path, *, received: bool) -> None:
        self._finished_bytes += place.file.nbytes
        self._on_event(FileFinished(place.file, path, received))

    def _report(self, seconds: float) -> None:
        active = list(self._active)
        received, note = self._shared.received_bytes, self._shared.note or self._note
        files = tuple(
            FileProgress(each.place.file.name, each.content.done_bytes, each.place.file.nbytes)
            for each in active
        )
        done = self._finished_bytes + sum(file.done_bytes for file in files)
        if not active and self._waiting:
            note = "waiting for another download of these files"
        self._on_event(DownloadProgress(done, self._total_bytes, received, seconds, files, note))

    def _end(self, streams: Sequence[threading.Thread]) -> None:
        """End the streams, which write what they have, and close everything."""
        self._shared.stop.set()
        with self._condition:
            self._condition.notify_all()
        deadline = time.monotonic() + _END_SECONDS
        for stream in streams:
            stream.join(max(0.0, deadline - time.monotonic()))
        for active in self._active:
            active.content.stop()
        self._hashers.shutdown(wait=True, cancel_futures=True)
        alive = any(stream.is_alive() for stream in streams)
        for active in self._active:
            if not alive:  # a stream that still waits for its server may write once more
                active.content.close()
            active.lock.close()

    # --- streams ----------------------------------------------------------------------------------

    def _stream(self) -> None:
        stream = RangeStream(self._options, self._shared)
        try:
            while (work := self._next_range()) is not None:
                active, claim = work
                ranged = active.ranged
                try:
                    ranged = stream.fetch(active.source, active.content, claim, ranged)
                finally:
                    with self._condition:
                        active.streams -= 1
                        active.ranged = active.ranged and ranged
                        self._condition.notify_all()
                    self._happened.put(None)
        except RetiredError as retired:
            with self._condition:
                self._streams_left -= 1
                if self._streams_left == 0:
                    self._happened.put(retired.error)
        except OSError as error:
            self._happened.put(unwritable(error, self._folder))
        except BaseException as error:
            self._happened.put(error)

    def _next_range(self) -> tuple[_Active, tuple[int, int]] | None:
        """Wait for a range to fetch; None at the end."""
        with self._condition:
            while not self._shared.stop.is_set():
                for active in sorted(self._active, key=lambda each: each.streams):
                    if active.streams and not (active.ranged and self._all_begun):
                        continue
                    most = self._range_bytes() if active.ranged else active.place.file.nbytes
                    if claim := active.content.claim(most):
                        active.streams += 1
                        return active, claim
                self._condition.wait()
        return None

    def _range_bytes(self) -> int:
        """Return the length of the next range: shorter towards the end, so that all end at once."""
        left = sum(active.content.unclaimed_bytes() for active in self._active)
        left += sum(place.file.nbytes for place, _ in self._waiting)
        fair = left // (4 * self._options.streams)
        return max(_LEAST_RANGE_BYTES, min(_MOST_RANGE_BYTES, fair))
