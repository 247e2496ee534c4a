"""File that is being downloaded: its bytes, its journal, and its hash as far as it is known."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path

from k2cli.files import open_regular, write_at
from k2cli.models.digests import new_digest
from k2cli.models.sources.expected_files import ExpectedFile
from k2cli.models.sources.journal import MAX_SPAN_BYTES, Journal, Span, sample_crc32

PIECE_BYTES = 2**17
"""Bytes that a stream collects before it writes them.

A kill loses at most these and one read of 256 KiB per stream, so 3.1 MB for eight.
"""

Later = Callable[[Callable[[], None]], None]


class PartialFile:
    """Partial content of one file, written by several streams at once.

    Bytes are hashed in their order: by the stream that wrote them if it is its turn, or else later
    from the disk. Bytes from an earlier run are compared with the journal's checksums on the way.
    """

    def __init__(self, expected: ExpectedFile, data: Path, journal: Path, later: Later) -> None:
        """Open the files, and continue what they have.

        Args:
            later: runs a function in another thread; used to hash what streams left behind.

        Raises:
            OSError: if a file cannot be opened or read.
        """
        self.expected = expected
        self._later = later
        self._lock = threading.Lock()
        self._journal_lock = threading.Lock()
        self._digest = new_digest(expected.blob_name, expected.nbytes)
        self._hashed, self._hashing, self._stopped = 0, False, False
        self._descriptor = open_regular(data, os.O_RDWR | os.O_CREAT)
        try:
            self._journal = Journal(journal, expected)
        except BaseException:
            os.close(self._descriptor)
            raise
        if self._journal.begun:
            os.ftruncate(self._descriptor, 0)
        there = os.fstat(self._descriptor).st_size
        spans = [span for span in self._journal.spans if span.past_last <= there]
        self._loaded = {span.first for span in spans}
        self._journal.spans = []
        # Spans that are not hashed yet, by their first byte, and the ranges nobody fetches.
        self._spans = {span.first: span for span in spans}
        self._gaps = _gaps(spans, expected.nbytes)
        self.done_bytes = sum(span.past_last - span.first for span in spans)

    def start(self) -> None:
        """Begin to check and hash what an earlier run left."""
        self._hash_later()

    def unclaimed_bytes(self) -> int:
        """Return the number of missing bytes that no stream is fetching."""
        with self._lock:
            return sum(past_last - first for first, past_last in self._gaps)

    def claim(self, most_bytes: int) -> tuple[int, int] | None:
        """Take the first missing range, at most that long; None if there is none."""
        with self._lock:
            if not self._gaps:
                return None
            first, past_last = self._gaps.pop(0)
            if past_last - first > most_bytes:
                self._gaps.insert(0, (first + most_bytes, past_last))
                past_last = first + most_bytes
            return first, past_last

    def claim_rest(self, past_last: int) -> int:
        """Extend a claimed range that ends at ``past_last`` by the gap that follows it."""
        with self._lock:
            for gap in self._gaps:
                if gap[0] == past_last:
                    self._gaps.remove(gap)
                    return gap[1]
        return past_last

    def release(self, first: int, past_last: int) -> None:
        """Give back a claimed range that was not fetched."""
        if first < past_last:
            with self._lock:
                self._add_gap(first, past_last)

    def write(self, first: int, data: bytes) -> None:
        """Write bytes of a claimed range, at most 1 MiB, and record them.

        Raises:
            OSError: if they cannot be written.
        """
        span = Span(first, first + len(data), sample_crc32(data))
        write_at(self._descriptor, data, first)
        with self._journal_lock:
            self._journal.append(span)
        with self._lock:
            self.done_bytes += len(data)
            if self._hashing or first != self._hashed:
                self._spans[first] = span
                return
            self._hashing = True
        self._digest.update(data)
        with self._lock:
            self._hashed, self._hashing = span.past_last, False
        self._hash_later()

    def is_hashed(self) -> bool:
        """True if all bytes are there and hashed."""
        with self._lock:
            return self._hashed == self.expected.nbytes and not self._hashing

    def is_right(self) -> bool:
        """True if the hash of all bytes is the expected one."""
        return self._digest.hexdigest() == self.expected.blob_name

    def _hash_later(self) -> None:
        with self._lock:
            if self._hashing or self._hashed not in self._spans:
                return
            self._hashing = True
        self._later(self._hash_from_disk)

    def _hash_from_disk(self) -> None:
        """Hash the spans that follow, in order, and drop those that are not what was written."""
        while True:
            with self._lock:
                span = None if self._stopped else self._spans.pop(self._hashed, None)
                if span is None:
                    self._hashing = False
                    return
            data = self._read(span)
            if span.first in self._loaded and not _is_intact(data, span):
                self._drop_damaged(span)
                return
            self._digest.update(data)
            with self._lock:
                self._hashed = span.past_last

    def _drop_damaged(self, first_found: Span) -> None:
        """Find all damaged spans once one is, so that they are not fetched one at a time."""
        with self._lock:
            spans = list(self._spans.values())
        damaged = [span for span in spans if not _is_intact(self._read(span), span)]
        with self._lock:
            for span in (first_found, *damaged):
                self._spans.pop(span.first, None)
                self._loaded.discard(span.first)
                self._add_gap(span.first, span.past_last)
                self.done_bytes -= span.past_last - span.first
            self._hashing = False

    def _add_gap(self, first: int, past_last: int) -> None:
        merged: list[tuple[int, int]] = []
        for gap in sorted([*self._gaps, (first, past_last)]):
            if merged and merged[-1][1] == gap[0]:
                merged[-1] = (merged[-1][0], gap[1])
            else:
                merged.append(gap)
        self._gaps = merged

    def _read(self, span: Span) -> bytes:
        try:
            length = min(span.past_last - span.first, MAX_SPAN_BYTES)
            return os.pread(self._descriptor, length, span.first)
        except OSError:
            return b""  # a damaged sector is fetched again, to another place if need be

    def stop(self) -> None:
        """End the hashing from the disk soon."""
        self._stopped = True

    def close(self) -> None:
        """Close the files; they stay for the next run."""
        os.close(self._descriptor)
        self._journal.close()


def _is_intact(data: bytes, span: Span) -> bool:
    return len(data) == span.past_last - span.first and sample_crc32(data) == span.crc32


def _gaps(spans: list[Span], size: int) -> list[tuple[int, int]]:
    gaps, end = [], 0
    for span in spans:
        if span.first > end:
            gaps.append((end, span.first))
        end = span.past_last
    if end < size:
        gaps.append((end, size))
    return gaps
