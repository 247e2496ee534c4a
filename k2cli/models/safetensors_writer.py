"""Writing of safetensors checkpoints whose layout is known before their data.

The place of every tensor follows from the shapes, so disk space for the files is reserved before
the first byte is computed, and data may arrive tensor by tensor or in pieces of a tensor.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from k2cli.files import write_at
from k2cli.models.layout import INDEX_NAME
from k2cli.models.safetensors_header import DTYPE_BITS

if TYPE_CHECKING:
    from numpy.typing import NDArray

MAX_SHARD_BYTES = 5_000_000_000


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor to write; ``dtype`` is the format's name, such as ``U32``."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * DTYPE_BITS[self.dtype] // 8


def write_safetensors(
    folder: Path, specs: Sequence[TensorSpec], arrays: Iterable[NDArray[Any]]
) -> None:
    """Write ``model.safetensors``, or shards of at most 5 GB and their index, into ``folder``.

    ``arrays`` yields the data of ``specs`` in the same order; one tensor is in memory at a time.

    Raises:
        ValueError: if the size of an array differs from its spec's.
    """
    source = iter(arrays)
    with ShardWriter(folder, specs) as writer:
        for spec in specs:
            data = next(source).tobytes()
            if len(data) != spec.nbytes:
                raise ValueError(f"'{spec.name}' has {len(data)} bytes, expected {spec.nbytes}")
            writer.write(spec.name, 0, data)
    if writer.shards > 1:
        metadata = {"total_size": sum(spec.nbytes for spec in specs)}
        index = {"metadata": metadata, "weight_map": writer.file_names}
        (folder / INDEX_NAME).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")


@dataclass(frozen=True, slots=True)
class _Place:
    shard: int
    offset: int
    nbytes: int


class ShardWriter:
    """Writer of a checkpoint's files: reserved first, then filled in any order.

    Use as a context manager: leaving it flushes the files to disk and closes them.
    ``file_names`` maps each tensor to its file, in the order of the tensors.
    """

    def __init__(
        self, folder: Path, tensors: Sequence[TensorSpec], shard_bytes: int = MAX_SHARD_BYTES
    ) -> None:
        self._folder = folder
        self._shards = into_shards(tensors, shard_bytes)
        self.shards = len(self._shards)
        self.file_names = {
            tensor.name: shard_name(number, self.shards)
            for number, shard in enumerate(self._shards, start=1)
            for tensor in shard
        }
        self._places: dict[str, _Place] = {}
        self._files: list[int] = []

    def __enter__(self) -> ShardWriter:
        for number, shard in enumerate(self._shards):
            path = self._folder / shard_name(number + 1, self.shards)
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0)
            self._files.append(os.open(path, flags, 0o644))
            self._reserve(number, shard)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for file in self._files:
            try:
                if kind is None:
                    os.fsync(file)
            finally:
                os.close(file)
        self._files.clear()

    def write(self, name: str, at: int, data: bytes | memoryview) -> None:
        """Put ``data`` into a tensor, ``at`` bytes after its start.

        Raises:
            ValueError: if the data would reach beyond the tensor.
        """
        place = self._places[name]
        view = memoryview(data).cast("B")
        if at < 0 or at + len(view) > place.nbytes:
            raise ValueError(
                f"'{name}' has {place.nbytes} bytes, {len(view)} at {at} reach beyond it"
            )
        write_at(self._files[place.shard], view, place.offset + at)

    def _reserve(self, number: int, shard: Sequence[TensorSpec]) -> None:
        file = self._files[number]
        header = safetensors_header(shard)
        size = len(header)
        for tensor in shard:
            self._places[tensor.name] = _Place(number, size, tensor.nbytes)
            size += tensor.nbytes
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file, 0, size)
        else:
            os.truncate(file, size)
        os.pwrite(file, header, 0)


def into_shards(
    tensors: Iterable[TensorSpec], limit_bytes: int = MAX_SHARD_BYTES
) -> list[list[TensorSpec]]:
    """Divide tensors, in order, into files of at most ``limit_bytes`` of data each.

    A tensor larger than that gets a file of its own; there is always one file.
    """
    shards: list[list[TensorSpec]] = [[]]
    size = 0
    for tensor in tensors:
        if shards[-1] and size + tensor.nbytes > limit_bytes:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.nbytes
    return shards


def shard_name(number: int, count: int) -> str:
    """Return the name of file ``number`` of ``count``, from 1, as the Hub's tools expect it."""
    return "model.safetensors" if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"


def safetensors_header(tensors: Sequence[TensorSpec]) -> bytes:
    """Make the length and JSON of a safetensors header, padded to align data to 8 bytes."""
    fields: dict[str, Any] = {"__metadata__": {"format": "mlx"}}
    position = 0
    for tensor in tensors:
        fields[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [position, position + tensor.nbytes],
        }
        position += tensor.nbytes
    text = json.dumps(fields, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text
