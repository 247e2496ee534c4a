"""Writes safetensors files whose layout is known before their data.

Every tensor's place is planned from shapes, so that files are reserved on disk in full before the
first byte is computed, and data may arrive in pieces. Shards are cut as mlx-lm cuts them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from k2cli.models.checkpoint import INDEX_NAME
from k2cli.models.safetensors_writer import into_shards, safetensors_header, shard_name

MAX_SHARD_BYTES = 5 << 30
"""mlx-lm's own limit: 5 GiB, though it calls them GB."""


@dataclass(frozen=True, slots=True)
class OutputTensor:
    """A tensor of the new checkpoint; ``dtype`` is the format's name, such as ``U32``."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int


@dataclass(frozen=True, slots=True)
class _Place:
    shard: int
    offset: int
    nbytes: int


class ShardWriter:
    """Reserves the files of a checkpoint, then takes data for any place in them.

    Use as a context manager: leaving it flushes the files to disk and closes them.
    """

    def __init__(
        self, folder: Path, tensors: Sequence[OutputTensor], shard_bytes: int = MAX_SHARD_BYTES
    ) -> None:
        self._folder = folder
        self._shards = into_shards(tensors, shard_bytes)
        self._places: dict[str, _Place] = {}
        self._files: list[int] = []

    def __enter__(self) -> ShardWriter:
        for number, shard in enumerate(self._shards):
            path = self._folder / self._file_name(number)
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
            ValueError: if it would reach beyond the tensor.
        """
        place = self._places[name]
        view = memoryview(data).cast("B")
        if at < 0 or at + len(view) > place.nbytes:
            raise ValueError(
                f"'{name}' has {place.nbytes} bytes, {len(view)} at {at} reach beyond it"
            )
        position = place.offset + at
        while view:
            written = os.pwrite(self._files[place.shard], view, position)
            view = view[written:]
            position += written

    def write_index(self, total_parameters: int) -> None:
        """Write the index that tells which file holds which tensor."""
        names = {
            tensor.name: self._file_name(number)
            for number, shard in enumerate(self._shards)
            for tensor in shard
        }
        total = sum(tensor.nbytes for shard in self._shards for tensor in shard)
        index = {
            "metadata": {"total_size": total, "total_parameters": total_parameters},
            "weight_map": dict(sorted(names.items())),
        }
        (self._folder / INDEX_NAME).write_text(json.dumps(index, indent=4), encoding="utf-8")

    def _file_name(self, number: int) -> str:
        return shard_name(number + 1, len(self._shards))

    def _reserve(self, number: int, shard: Sequence[OutputTensor]) -> None:
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
