"""Reading of parts of stored tensors by ranges of their files, straight into MLX's own memory.

mlx reads only whole tensors. But it also reads from any Python file object, and asks that object to
fill the array's memory. So a part of a tensor is presented to mlx as a safetensors file that exists
only as an object: a header that describes the part, and data that is read from the ranges of the
real file when mlx asks for it. Nothing is copied or held twice, and element types that Python does
not know (bfloat16) need no special treatment.

The position of the ranges decides the way of reading them:

* Slices along leading axes are a few long ranges, which several threads read directly.
* Slices along the last axis are a piece of each row. If the gaps between the pieces are long,
  each piece is a read of its own. If they are short (K2's expert rows have 1,024 bytes), whole
  rows are read, a block at a time, and the pieces are copied out of them. A disk reads pages of 4
  to 16 KiB, so it would read the gaps in any case; and a system call per piece takes 1.25 us,
  twelve times as long as reading and copying its row. These gaps are the over-read: with two ranks,
  a piece of 512 bytes costs the reading of 1,024.
"""

from __future__ import annotations

import json
import os
import struct
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self, cast

import mlx.core as mx

from k2cli.errors import InternalError, K2Error
from k2cli.files import open_regular
from k2cli.models.safetensors_header import DTYPE_BITS, StoredTensor
from k2cli.sharding.slices import AxisSlice, Run

_READABLE_TYPES = frozenset(
    ("BOOL", "U8", "I8", "U16", "I16", "U32", "I32", "U64", "I64", "F16", "BF16", "F32")
)
"""Element types that mlx holds in memory with the same bytes as the file."""

THREADS = 4
_JOB_BYTES = 16_777_216
"""Bytes that one thread reads at a time; progress is reported after each."""

_BLOCK_BYTES = 1_048_576
"""Bytes of rows that are read to copy pieces out of them; fits a processor's cache."""

_SHORTEST_GAP_BYTES = 32_768
"""Shortest gap that is skipped: a longer gap spares the disk work too."""


_RELEASE_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class Layout:
    """Position of a slice's bytes in its tensor: the same ``pieces`` in each of ``rows`` rows.

    ``pieces`` are half-open ranges of bytes within a row of ``row_bytes``.
    """

    rows: int
    row_bytes: int
    pieces: tuple[Run, ...]

    @property
    def taken_bytes(self) -> int:
        """Bytes of one row that belong to the slice."""
        return sum(past_last - first for first, past_last in self.pieces)

    @property
    def reads_whole_rows(self) -> bool:
        """True if rows are read with the gaps between their pieces."""
        if self.rows == 1 or self.row_bytes > _BLOCK_BYTES:
            return False
        starts = [first for first, _ in self.pieces] + [self.row_bytes + self.pieces[0][0]]
        ends = [past_last for _, past_last in self.pieces]
        gaps = [start - end for start, end in zip(starts[1:], ends, strict=True)]
        return min(gaps) < _SHORTEST_GAP_BYTES


def suits(tensor: StoredTensor, part: AxisSlice) -> bool:
    """True if ``TensorReader`` should read a slice; False if mlx should read the whole tensor.

    mlx must hold the element type as it is stored. For whole tensors mlx is as fast: the reader
    adds only progress within large ones, and costs 0.2 ms more for a small one.
    """
    if tensor.dtype not in _READABLE_TYPES or tensor.nbytes == 0:
        return False
    return not part.is_whole or tensor.nbytes > _JOB_BYTES


def layout_of(tensor: StoredTensor, part: AxisSlice, blocks: int = 1) -> Layout:
    """Return the position of a slice in its stored tensor, in bytes.

    Its rows divide into ``blocks``, which are those along leading axes.
    """
    item_bytes = DTYPE_BITS[tensor.dtype] // 8
    shape = tensor.shape or (1,)
    if part.is_whole:
        return Layout(blocks, tensor.nbytes // blocks, ((0, tensor.nbytes // blocks),))
    inner = item_bytes * prod(shape[part.axis + 1 :])
    pieces = tuple((first * inner, past_last * inner) for first, past_last in part.runs)
    return Layout(prod(shape[: part.axis]), shape[part.axis] * inner, pieces)


def _jobs_of_blocks(
    target: memoryview, sources: Sequence[_Ranges], blocks: int
) -> Iterator[tuple[Callable[[], int], int]]:
    """Yield the reads that fill ``target``: for each block the part of each source in turn."""
    if len(sources) == 1:
        yield from sources[0].jobs(target)
        return
    filled = 0
    for block in range(blocks):
        for source in sources:
            rows = source.layout.rows // blocks
            length = rows * source.layout.taken_bytes
            part = target[filled : filled + length]
            yield from source.jobs(part, block * rows, (block + 1) * rows)
            filled += length


class TensorReader:
    """Reader of slices of stored tensors; a context manager that closes its files.

    Attributes:
        bytes_read: bytes read from the files so far.
        bytes_taken: bytes of these that the arrays hold; the rest was over-read.
    """

    def __init__(self) -> None:
        self.bytes_read = 0
        self.bytes_taken = 0
        self._descriptors: dict[Path, int] = {}
        self._pool = ThreadPoolExecutor(THREADS, thread_name_prefix="reader")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._pool.shutdown(cancel_futures=True)
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()

    def read(
        self, tensor: StoredTensor, part: AxisSlice, on_bytes: Callable[[int], None]
    ) -> mx.array:
        """Read a slice of a stored tensor and return it, evaluated.

        Args:
            tensor: not empty, and of a type that mlx holds as it is stored.
            part: a slice of an array of the tensor's shape.
            on_bytes: called from time to time with the number of bytes read.

        Raises:
            K2Error: if the file cannot be read or is shorter than its header says.
        """

        return self.read_joined([(tensor, part)], 0, on_bytes)

    def read_joined(
        self,
        sources: Sequence[tuple[StoredTensor, AxisSlice]],
        axis: int,
        on_bytes: Callable[[int], None],
    ) -> mx.array:
        """Read slices of stored tensors into one array, one behind the other along ``axis``.

        Args:
            sources: as in ``read``, of one element type; each slice is whole or along ``axis`` or
                a later axis, and their other lengths are equal.
            on_bytes: called from time to time with the number of bytes read.

        Raises:
            K2Error: as ``read``.
        """
        shape = list(sources[0][1].result_shape)
        if len(sources) > 1:
            shape[axis] = sum(part.result_shape[axis] for _, part in sources)
        blocks = prod(shape[:axis])

        def fill(target: memoryview) -> None:
            ranges = [
                _Ranges(self._open(tensor.file), tensor, layout_of(tensor, part, blocks))
                for tensor, part in sources
            ]
            self._fill(target, ranges, blocks, on_bytes)

        file = _PartFile(sources[0][0].dtype, tuple(shape), fill)
        released = threading.Event()
        watch = weakref.ref(file, lambda _: released.set())
        arrays = mx.load(cast(BinaryIO, file), format="safetensors")
        assert isinstance(arrays, dict)
        array = arrays["part"]
        mx.eval(array)
        if file.error is not None:
            raise file.error
        del file
        # mlx's thread releases the file a moment later, and needs the interpreter for it. Wait, or
        # the process aborts if the interpreter ends before that.
        released.wait(_RELEASE_SECONDS)
        del watch
        self.bytes_taken += array.nbytes
        return array

    def _fill(
        self,
        target: memoryview,
        sources: Sequence[_Ranges],
        blocks: int,
        on_bytes: Callable[[int], None],
    ) -> None:
        """Fill ``target``, which has a part of each source in each of ``blocks``."""
        jobs = _jobs_of_blocks(target, sources, blocks)
        if target.nbytes <= _JOB_BYTES:
            self.bytes_read += sum(job() for job, _ in jobs)
            return
        pending = [(self._pool.submit(job), filled) for job, filled in jobs]
        done = 0
        try:
            for future, filled in pending:
                self.bytes_read += future.result()
                done += filled
                on_bytes(done)
        finally:
            # mlx owns the memory: no thread may write to it after this method has returned.
            for future, _ in pending:
                if not future.cancel():
                    future.exception()

    def _open(self, file: Path) -> int:
        if file not in self._descriptors:
            try:
                self._descriptors[file] = open_regular(file, follow_links=True)
            except OSError as error:
                raise K2Error(f"cannot read {file}: {error.strerror}") from error
        return self._descriptors[file]


@dataclass(frozen=True, slots=True)
class _Ranges:
    """The read operations for a slice of one tensor. Each returns the number of bytes it read."""

    descriptor: int
    tensor: StoredTensor
    layout: Layout

    def jobs(
        self, target: memoryview, first_row: int = 0, past_row: int | None = None
    ) -> Iterator[tuple[Callable[[], int], int]]:
        """Yield the reads that together fill ``target``, each with the bytes that it fills.

        ``target`` is for the rows from ``first_row`` to before ``past_row``; None: all of them.
        """
        layout = self.layout
        rows = layout.rows if past_row is None else past_row
        many_rows = max(1, _JOB_BYTES // layout.row_bytes)
        read = self._read_rows if layout.reads_whole_rows else self._read_pieces
        for first in range(first_row, rows, many_rows):
            past_last = min(first + many_rows, rows)
            filled = (first - first_row) * layout.taken_bytes
            part = target[filled : filled + (past_last - first) * layout.taken_bytes]
            if layout.row_bytes <= _JOB_BYTES:
                yield partial(read, first, past_last, part), part.nbytes
            else:
                yield from self._long_jobs(first, part)

    def _long_jobs(self, row: int, target: memoryview) -> Iterator[tuple[Callable[[], int], int]]:
        """Yield the reads of one row, whose pieces may each be longer than a job."""
        filled = 0
        for start, end in self.layout.pieces:
            for low in range(start, end, _JOB_BYTES):
                length = min(_JOB_BYTES, end - low)
                part = target[filled : filled + length]
                yield partial(self._read_into, row * self.layout.row_bytes + low, part), length
                filled += length

    def _read_pieces(self, first: int, past_last: int, target: memoryview) -> int:
        """Read each piece of the rows with a read of its own."""
        filled = 0
        for row in range(first, past_last):
            for start, end in self.layout.pieces:
                part = target[filled : filled + end - start]
                filled += self._read_into(row * self.layout.row_bytes + start, part)
        return filled

    def _read_rows(self, first: int, past_last: int, target: memoryview) -> int:
        """Read whole rows, a block at a time, and copy their pieces out."""
        import numpy as np

        row_bytes = self.layout.row_bytes
        start, end = self.layout.pieces[0][0], self.layout.pieces[-1][1]
        block_rows = min(max(1, _BLOCK_BYTES // row_bytes), past_last - first)
        block = np.empty((block_rows, row_bytes), np.uint8)
        rows = np.frombuffer(target, np.uint8).reshape(-1, self.layout.taken_bytes)
        read = 0
        for low in range(0, past_last - first, block_rows):
            count = min(block_rows, past_last - first - low)
            # Read from the first piece of the first row to the last piece of the last row.
            length = (count - 1) * row_bytes + end - start
            flat = block.reshape(-1).data[start : start + length]
            read += self._read_into((first + low) * row_bytes + start, flat)
            column = 0
            for piece_start, piece_end in self.layout.pieces:
                past_column = column + piece_end - piece_start
                rows[low : low + count, column:past_column] = block[:count, piece_start:piece_end]
                column = past_column
        return read

    def _read_into(self, position: int, target: memoryview) -> int:
        """Fill ``target`` from the tensor, beginning at ``position``."""
        done = 0
        while done < target.nbytes:
            try:
                offset = self.tensor.offset + position + done
                count = os.preadv(self.descriptor, [target[done:]], offset)
            except OSError as error:
                raise K2Error(f"cannot read {self.tensor.file}: {error.strerror}") from error
            if count == 0:
                raise K2Error(
                    f"{self.tensor.file} is cut short: it ends within '{self.tensor.name}'",
                    "download it again",
                )
            done += count
        return done


class _PartFile:
    """Imitation of a safetensors file with one tensor, ``part``, for mlx to read.

    mlx calls ``readinto`` on a thread of its own, on which an exception would end the process; so
    an exception is kept in ``error``.
    """

    closed = False

    def __init__(
        self, dtype: str, shape: tuple[int, ...], fill: Callable[[memoryview], None]
    ) -> None:
        self._nbytes = prod(shape) * DTYPE_BITS[dtype] // 8
        entry = {"dtype": dtype, "shape": list(shape), "data_offsets": [0, self._nbytes]}
        header = json.dumps({"part": entry}).encode()
        self._prefix = struct.pack("<Q", len(header)) + header
        self._fill = fill
        self._position = 0
        self.error: BaseException | None = None

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        end = len(self._prefix) + self._nbytes
        origins = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: end}
        self._position = origins[whence] + offset
        return self._position

    def read(self, count: int = -1) -> bytes:
        """Return part of the header; mlx reads data by ``readinto``."""
        end = None if count < 0 else self._position + count
        piece = self._prefix[self._position : end]
        self._position += len(piece)
        return piece

    def readinto(self, buffer: memoryview) -> int:
        """Fill a buffer at the position, with part of the header or with all of the data."""
        target = memoryview(buffer).cast("B")
        length = target.nbytes
        if length == 0:
            return 0
        if self._position < len(self._prefix):
            target[:] = self._prefix[self._position : self._position + length]
        elif self.error is None:
            try:
                if (self._position, length) != (len(self._prefix), self._nbytes):
                    raise InternalError("mlx did not ask for a tensor's data in one piece")
                self._fill(target)
            except BaseException as error:  # the reader raises it again on its own thread
                self.error = error
        self._position += length
        return length
