"""Writes safetensors files tensor by tensor, so that no more than one tensor is ever in memory."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from k2cli.models.checkpoint import DTYPE_BITS, INDEX_NAME

if TYPE_CHECKING:
    from numpy.typing import NDArray

MAX_SHARD_BYTES = 5_000_000_000


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor to write: ``dtype`` is the format's name (``F16``, ``U32``)."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Size of the data."""
        return prod(self.shape) * DTYPE_BITS[self.dtype] // 8


def write_safetensors(
    folder: Path, specs: Sequence[TensorSpec], arrays: Iterable[NDArray[Any]]
) -> None:
    """Write ``model.safetensors``, or shards of at most 5 GB and their index, into ``folder``.

    ``arrays`` yields the data of ``specs`` in the same order.

    Raises:
        ValueError: if an array has not the size that its spec says.
    """
    shards = into_shards(specs)
    source = iter(arrays)
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        name = shard_name(number, len(shards))
        _write_file(folder / name, shard, source)
        weight_map.update({spec.name: name for spec in shard})
    if len(shards) > 1:
        total = sum(spec.nbytes for spec in specs)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX_NAME).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")


class Sized(Protocol):
    """A tensor whose size is known."""

    @property
    def nbytes(self) -> int:
        """Size of the data."""
        ...


TensorT = TypeVar("TensorT", bound=Sized)


def into_shards(
    tensors: Iterable[TensorT], limit_bytes: int = MAX_SHARD_BYTES
) -> list[list[TensorT]]:
    """Divide tensors, in order, into files of at most ``limit_bytes`` of data each.

    A tensor larger than that gets a file of its own; there is always one file.
    """
    shards: list[list[TensorT]] = [[]]
    size = 0
    for tensor in tensors:
        if shards[-1] and size + tensor.nbytes > limit_bytes:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.nbytes
    return shards


def shard_name(number: int, count: int) -> str:
    """Name of file ``number`` of ``count``, from 1 on, as the Hub's tools expect it."""
    return "model.safetensors" if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"


class HeaderEntry(Protocol):
    """What a header says of a tensor; ``dtype`` is the format's name."""

    @property
    def name(self) -> str: ...
    @property
    def dtype(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def nbytes(self) -> int: ...


def safetensors_header(tensors: Sequence[HeaderEntry]) -> bytes:
    """Length and JSON of a safetensors header, padded so that data is aligned to 8 bytes."""
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


def _write_file(path: Path, specs: Sequence[TensorSpec], arrays: Iterator[NDArray[Any]]) -> None:
    with path.open("wb") as stream:
        stream.write(safetensors_header(specs))
        for spec in specs:
            data = next(arrays).tobytes()
            if len(data) != spec.nbytes:
                raise ValueError(f"'{spec.name}' has {len(data)} bytes, expected {spec.nbytes}")
            stream.write(data)
