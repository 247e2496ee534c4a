"""The form of a stream of segments: a mark, then for each segment its header, data and SHA-256.

A receiver refuses what was not offered: another file, place or length ends the stream. Nothing is
kept in memory but one block of each stream.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Mapping
from pathlib import Path

from k2cli.agent.weights.incoming import IncomingFile
from k2cli.agent.weights.messages import SEGMENT_BYTES, Segments, segment_length
from k2cli.errors import ClusterError, K2Error
from k2cli.files import open_regular
from k2cli.models.digests import new_sha256

MARK = b"\nk2-weights-stream-1\n"
_MAX_GREETING_BYTES = 2**16
_HEADER = struct.Struct("<BIQI")
_SEGMENT, _ALIVE, _END = 1, 2, 3
BLOCK_BYTES = 2**20
_DIGEST_BYTES = 32

Read = Callable[[memoryview], int]
"""Function that fills a buffer as far as it can, like ``recv_into``; 0 is the end."""
Write = Callable[[memoryview | bytes], None]
"""Function that writes all of its bytes."""


class StreamLost(ClusterError):
    """The stream ended, or its data was damaged; what was confirmed is kept."""


# --- sending ------------------------------------------------------------------------------------


class SegmentWriter:
    """Writer of one stream; it reads each segment once, hashes and sends it."""

    def __init__(self, write: Write) -> None:
        self._write = write
        self._buffer = memoryview(bytearray(BLOCK_BYTES))
        self.sent_bytes = 0

    def begin(self) -> None:
        """Send the mark, which a receiver finds after what start-up files print."""
        self._write(MARK)

    def send(self, folder: Path, file: Segments, number: int) -> None:
        """Send one segment.

        Raises:
            K2Error: if the file cannot be read, or has another size by now.
        """
        path = folder / file.source
        length = segment_length(file.nbytes, number)
        offset = number * SEGMENT_BYTES
        try:
            descriptor = open_regular(path, follow_links=True)
        except OSError as error:
            raise K2Error(f"cannot read {path}: {error.strerror}") from error
        try:
            self._write(_HEADER.pack(_SEGMENT, file.index, offset, length))
            digest = new_sha256()
            for start in range(0, length, BLOCK_BYTES):
                block = self._buffer[: min(BLOCK_BYTES, length - start)]
                _read_exactly(descriptor, path, block, offset + start)
                digest.update(block)
                self._write(block)
            self._write(digest.digest())
        finally:
            os.close(descriptor)
        self.sent_bytes += length

    def keep_alive(self) -> None:
        """Tell the receiver that more will follow."""
        self._write(_HEADER.pack(_ALIVE, 0, 0, 0))

    def end(self) -> None:
        """Tell the receiver that nothing follows."""
        self._write(_HEADER.pack(_END, 0, 0, 0))


def _read_exactly(descriptor: int, path: Path, block: memoryview, offset: int) -> None:
    done = 0
    while done < len(block):
        try:
            count = os.preadv(descriptor, [block[done:]], offset + done)
        except OSError as error:
            raise K2Error(f"cannot read {path}: {error.strerror}") from error
        if count == 0:
            raise K2Error(f"{path} became shorter while it was sent", "send it again")
        done += count


# --- receiving ----------------------------------------------------------------------------------


class SegmentReader:
    """Reader of one stream, which writes what arrives into the files of the offer."""

    def __init__(
        self,
        read: Read,
        files: Mapping[int, IncomingFile],
        on_bytes: Callable[[int], None],
        on_complete: Callable[[int], None],
    ) -> None:
        self._read = read
        self._files = files
        self._on_bytes = on_bytes
        self._on_complete = on_complete
        self._buffer = memoryview(bytearray(BLOCK_BYTES))

    def skip_greeting(self) -> None:
        """Read up to the mark: the user's start-up files may print text before it.

        Raises:
            StreamLost: if it does not come.
        """
        seen = b""
        one = memoryview(bytearray(1))
        while not seen.endswith(MARK):
            if len(seen) > _MAX_GREETING_BYTES:
                raise StreamLost("the sender sent something else than weights")
            self._fill(one)
            seen += bytes(one)

    def receive(self) -> None:
        """Receive segments until the end of the stream.

        Raises:
            StreamLost: if it ends early, or a segment is damaged or was not asked for.
            OSError: if a file cannot be written.
        """
        header = memoryview(bytearray(_HEADER.size))
        while True:
            self._fill(header)
            kind, index, offset, length = _HEADER.unpack(header)
            if kind == _SEGMENT:
                self._segment(index, offset, length)
            elif kind == _END:
                return
            elif kind != _ALIVE:
                raise StreamLost("the sender broke the protocol")

    def _segment(self, index: int, offset: int, length: int) -> None:
        file, number = self._files.get(index), offset // SEGMENT_BYTES
        if (
            file is None
            or offset % SEGMENT_BYTES
            or number not in file.missing
            or length != segment_length(file.offer.nbytes, number)
        ):
            raise StreamLost("the sender sent a piece that was not asked for")
        file.open()
        digest = new_sha256()
        done = 0
        while done < length:
            block = self._buffer[: min(BLOCK_BYTES, length - done)]
            self._fill(block)
            digest.update(block)
            file.write(offset + done, block)
            done += len(block)
        told = memoryview(bytearray(_DIGEST_BYTES))
        self._fill(told)
        if digest.digest() != bytes(told):
            raise StreamLost(f"{file.offer.name} was damaged on its way")
        complete = file.confirm(number, digest.hexdigest())
        self._on_bytes(length)
        if complete:
            self._on_complete(index)

    def _fill(self, buffer: memoryview) -> None:
        done = 0
        while done < len(buffer):
            count = self._read(buffer[done:])
            if not count:
                raise StreamLost("the connection to the sender was lost")
            done += count
