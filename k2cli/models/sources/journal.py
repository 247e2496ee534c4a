"""Journal of a partial file: which of its bytes are there, with a checksum of each span.

It is written after the bytes. Each entry has a checksum of samples of the bytes that it names,
eight of each page, which is compared before they are used: pages that a power failure took although
the journal knows them are found and fetched again. So no ``fsync`` is needed while a file grows.
All other damage is found by the hash of the whole file.
"""

from __future__ import annotations

import bisect
import hashlib
import os
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

from k2cli.files import open_regular, read_regular, write_at
from k2cli.models.sources.expected_files import ExpectedFile

_MAGIC = b"k2-journal-1\n"
_HEADER_BYTES = len(_MAGIC) + 32
_NUMBERS = struct.Struct("<QII")
_ENTRY = struct.Struct("<QIII")
MAX_SPAN_BYTES = 2**20
"""Longest span of one entry."""

_SAMPLE_STRIDE = 512
_MAX_JOURNAL_BYTES = 2**30


@dataclass(frozen=True, slots=True)
class Span:
    """Bytes ``first`` to before ``past_last`` of a file, with the CRC-32 of samples of them."""

    first: int
    past_last: int
    crc32: int


def sample_crc32(data: bytes) -> int:
    """Return the CRC-32 of every 512th byte and the last ones.

    All bytes would take half as long as their SHA-256.
    """
    return zlib.crc32(data[-8:], zlib.crc32(data[::_SAMPLE_STRIDE]))


class Journal:
    """Append-only file of spans; it begins anew if it is that of other content."""

    def __init__(self, path: Path, file: ExpectedFile) -> None:
        """Open the journal at ``path``, or begin one, and read its ``spans``.

        Raises:
            OSError: if it cannot be opened, read or written.
        """
        header, size = _header(file), file.nbytes
        self._descriptor = open_regular(path, os.O_RDWR | os.O_CREAT)
        self.spans: list[Span] = []
        self.begun = True
        try:
            content = self._read()
            if content[:_HEADER_BYTES] == header:
                self.begun = False
                self.spans = _spans_of(content[_HEADER_BYTES:], size)
                self._end = _HEADER_BYTES + _whole_entries(len(content) - _HEADER_BYTES)
            else:
                os.ftruncate(self._descriptor, 0)
                write_at(self._descriptor, header, 0)
                self._end = _HEADER_BYTES
        except BaseException:
            os.close(self._descriptor)
            raise

    def _read(self) -> bytes:
        size = min(os.fstat(self._descriptor).st_size, _MAX_JOURNAL_BYTES)
        return os.pread(self._descriptor, size, 0)

    def append(self, span: Span) -> None:
        """Record a span whose bytes were written; the caller does not call it twice at once.

        Raises:
            OSError: if it cannot be written; the journal is then as before.
        """
        numbers = _NUMBERS.pack(span.first, span.past_last - span.first, span.crc32)
        entry = numbers + struct.pack("<I", zlib.crc32(numbers))
        write_at(self._descriptor, entry, self._end)
        self._end += len(entry)

    def close(self) -> None:
        """Close the file."""
        os.close(self._descriptor)


def journaled_bytes(path: Path, file: ExpectedFile) -> int:
    """Return how many bytes of a file are there according to its journal, which may be absent."""
    try:
        content = read_regular(path, _MAX_JOURNAL_BYTES)
    except OSError:
        return 0
    if content[:_HEADER_BYTES] != _header(file):
        return 0
    spans = _spans_of(content[_HEADER_BYTES:], file.nbytes)
    return sum(span.past_last - span.first for span in spans)


def _header(file: ExpectedFile) -> bytes:
    return _MAGIC + hashlib.sha256(f"{file.blob_name} {file.nbytes}".encode()).digest()


def _whole_entries(length: int) -> int:
    return length - length % _ENTRY.size


def _spans_of(entries: bytes, size: int) -> list[Span]:
    """Return the valid spans in order; where two overlap, the one that was written later."""
    kept: list[Span] = []
    starts: list[int] = []
    usable = entries[: _whole_entries(len(entries))]
    for first, length, crc32, check in reversed(list(_ENTRY.iter_unpack(usable))):
        span = Span(first, first + length, crc32)
        if zlib.crc32(_NUMBERS.pack(first, length, crc32)) != check:
            continue
        if not 0 < length <= MAX_SPAN_BYTES or span.past_last > size:
            continue
        place = bisect.bisect_left(starts, first)
        if place > 0 and kept[place - 1].past_last > first:
            continue
        if place < len(kept) and kept[place].first < span.past_last:
            continue
        kept.insert(place, span)
        starts.insert(place, first)
    return kept
