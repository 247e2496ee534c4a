"""One stream of a download: fetches claimed ranges of files, again after failures that pass."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

from k2cli.errors import K2Error
from k2cli.models.sources.byte_source import ByteSource, PassingError
from k2cli.models.sources.partial_file import PIECE_BYTES, PartialFile
from k2cli.units import format_duration

_MOST_BACKOFF_SECONDS = 30.0
"""Longest wait between attempts if the server does not say how long to wait."""
_LONGEST_WAIT_SECONDS = 900.0
"""A server that wants a longer wait ends the download."""
_STALL_BYTES = 32 * 2**10
"""Fewer bytes in four times the read timeout are a stalled stream."""


@dataclass(frozen=True, slots=True)
class DownloadOptions:
    """Limits of a download. ``bytes_per_second`` limits all streams together.

    A stream that gets no byte for ``read_timeout_seconds``, or fewer than 32 KiB in four times
    that, is opened anew. A range that fails ``attempts`` times in a row without one new byte ends
    the download, or only its stream if others receive something meanwhile.
    """

    streams: int = 8
    bytes_per_second: int | None = None
    read_timeout_seconds: float = 20.0
    attempts: int = 8
    first_backoff_seconds: float = 0.5


class RateLimit:
    """Limit of the bytes per second of all streams of a download together."""

    def __init__(self, bytes_per_second: int | None) -> None:
        """Make a limit; None limits nothing."""
        self._rate = bytes_per_second
        self._lock = threading.Lock()
        self._free_at = time.monotonic()

    @property
    def is_set(self) -> bool:
        """True if there is a limit."""
        return self._rate is not None

    def take(self, count: int) -> float:
        """Take bytes, and return the seconds to wait before the next ones are read."""
        if self._rate is None:
            return 0.0
        with self._lock:
            now = time.monotonic()
            # Time in which nothing was read gives at most a tenth of a second of credit.
            self._free_at = max(self._free_at, now - 0.1) + count / self._rate
            return max(0.0, self._free_at - now)


@dataclass(slots=True)
class SharedState:
    """State that all streams of a download share."""

    limit: RateLimit
    stop: threading.Event = field(default_factory=threading.Event)
    lock: threading.Lock = field(default_factory=threading.Lock)
    received_bytes: int = 0
    wait_until_seconds: float = 0.0
    note: str = ""


class RetiredError(Exception):
    """A stream got nothing although others did: the server serves fewer connections.

    ``error`` is the one to show if no stream is left.
    """

    def __init__(self, error: K2Error) -> None:
        super().__init__(error.message)
        self.error = error


class RangeStream:
    """Fetches one claimed range of a file at a time; each thread has one of its own."""

    def __init__(self, options: DownloadOptions, shared: SharedState) -> None:
        self._options, self._shared = options, shared

    def fetch(
        self, source: ByteSource, content: PartialFile, claim: tuple[int, int], ranged: bool
    ) -> bool:
        """Fetch a claimed range, and give back what is missing of it if that ends early.

        Args:
            ranged: False if the source is known to send only whole files.

        Returns:
            False if the source turned out to send only whole files.

        Raises:
            K2Error: if more attempts are of no use.
            RetiredError: if this stream alone gets nothing.
            OSError: if the disk refuses the bytes.
        """
        reading = _Reading(*claim)
        failures, others = 0, self._shared.received_bytes
        try:
            while reading.missing_bytes and not self._shared.stop.is_set():
                before = reading.position
                failure = self._read(source, content, ranged, reading)
                if reading.position > before:
                    failures, others = 0, self._shared.received_bytes
                if not reading.ranged and ranged:
                    ranged = False
                    if reading.position == claim[0] > 0:
                        break  # its beginning is to be skipped, which one stream alone does
                if failure is not None and reading.missing_bytes:
                    failures += 1
                    self._back_off(content.expected.name, failure, failures, others)
        finally:
            content.release(reading.position, reading.past_last)
        return ranged

    def _read(
        self,
        source: ByteSource,
        content: PartialFile,
        ranged: bool,
        reading: _Reading,
    ) -> PassingError | None:
        """Read one answer and write it piece by piece; return why it ended early, if it did."""
        self._wait(self._shared.wait_until_seconds - time.monotonic())
        failure: PassingError | None = None
        try:
            with source.open(content.expected, reading.position, reading.past_last) as answer:
                reading.ranged = answer.ranged
                if not answer.ranged:
                    if ranged and reading.position > 0:
                        return None
                    reading.past_last = content.claim_rest(reading.past_last)
                for piece in self._pieces(answer.chunks, reading):
                    self._write(content, piece, reading)
        except PassingError as error:
            failure = error
        # What arrived before a failure, or before the end, is kept.
        self._write(content, b"".join(reading.chunks), reading)
        reading.chunks = []
        return failure or PassingError("the answer ended early")

    def _pieces(self, chunks: Iterator[bytes], reading: _Reading) -> Iterator[bytes]:
        """Collect chunks to pieces; ``reading.chunks`` has what is not in a piece yet."""
        collected, stall = 0, _Stall(self._options.read_timeout_seconds * 4)
        for chunk in chunks:
            if self._shared.stop.is_set():
                return
            chunk = chunk[: reading.missing_bytes - collected]
            reading.chunks.append(chunk)
            collected += len(chunk)
            if collected >= PIECE_BYTES:
                piece, reading.chunks, collected = b"".join(reading.chunks), [], 0
                yield piece
            if collected == reading.missing_bytes:
                return
            wait = self._shared.limit.take(len(chunk))
            if wait > 0:
                self._wait(wait)
            elif not self._shared.limit.is_set:
                stall.received(len(chunk))

    def _write(self, content: PartialFile, piece: bytes, reading: _Reading) -> None:
        if not piece:
            return
        content.write(reading.position, piece)
        reading.position += len(piece)
        with self._shared.lock:
            self._shared.received_bytes += len(piece)
            self._shared.note = ""

    def _back_off(self, name: str, failure: PassingError, failures: int, others: int) -> None:
        """Wait before the next attempt.

        Raises:
            K2Error, RetiredError: if there shall be none.
        """
        asked = failure.wait_seconds
        if failures >= self._options.attempts or (asked or 0.0) > _LONGEST_WAIT_SECONDS:
            error = _given_up(name, failure, failures)
            raise RetiredError(error) if self._shared.received_bytes > others else error
        seconds = self._options.first_backoff_seconds * 2.0 ** (failures - 1)
        seconds = min(seconds, _MOST_BACKOFF_SECONDS) * random.uniform(0.75, 1.25)
        if asked is not None:
            # "0", or a date that has passed, would use up all attempts within a second.
            asked = max(asked, seconds)
            until = time.monotonic() + asked
            with (
                self._shared.lock
            ):  # all streams have the same server, which wants them all to wait
                self._shared.wait_until_seconds = max(self._shared.wait_until_seconds, until)
                self._shared.note = (
                    f"the server asks to wait {format_duration(asked)} ({failure.reason})"
                )
            return
        with self._shared.lock:
            self._shared.note = f"{name}: {failure.reason}, trying again"
        self._wait(seconds)

    def _wait(self, seconds: float) -> None:
        if seconds > 0:
            self._shared.stop.wait(seconds)


@dataclass(slots=True)
class _Reading:
    """State of reading a range: the next byte to write, and bytes that are not written yet."""

    position: int
    past_last: int
    chunks: list[bytes] = field(default_factory=list)
    ranged: bool = True

    @property
    def missing_bytes(self) -> int:
        """Bytes that are still to be written."""
        return self.past_last - self.position


class _Stall:
    """Detects an answer that is so slow that a new connection is likely to be faster."""

    def __init__(self, window_seconds: float) -> None:
        self._window_seconds = window_seconds
        self._begun, self._bytes = time.monotonic(), 0

    def received(self, count: int) -> None:
        """Count bytes.

        Raises:
            PassingError: if too few came in a whole window.
        """
        self._bytes += count
        now = time.monotonic()
        if now - self._begun < self._window_seconds:
            return
        if self._bytes < _STALL_BYTES:
            raise PassingError(
                f"only {self._bytes} bytes came in {format_duration(now - self._begun)}"
            )
        self._begun, self._bytes = now, 0


def _given_up(name: str, failure: PassingError, failures: int) -> K2Error:
    if failure.wait_seconds is not None and failure.wait_seconds > _LONGEST_WAIT_SECONDS:
        return K2Error(
            f"the server wants k2 to wait {format_duration(failure.wait_seconds)} before it sends "
            f"more of {name} ({failure.reason})",
            "run the same command later: it continues",
        )
    return K2Error(
        f"cannot fetch {name}: {failure.reason}, {failures} times in a row",
        "check the network, and HF_ENDPOINT if you set it; the same command then continues",
    )
