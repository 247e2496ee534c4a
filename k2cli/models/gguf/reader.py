"""Reader of a GGUF file's header: metadata, and the offset of each tensor.

GGUF is llama.cpp's format: one file with typed metadata, tensor descriptions and data. A header
may be truncated or wrong, so every count and offset is checked against the file's size before
anything is allocated for it.
"""

from __future__ import annotations

import mmap
import os
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Any

from k2cli.errors import K2Error
from k2cli.files import open_regular
from k2cli.models.json_files import shown
from k2cli.models.layout import download_hint, refuse_pointer, split_parts

_MAX_HEADER_BYTES = 2**28
"""The headers of published files have up to 30 MB: vocabulary, merges and scores."""

_MAX_STRING_BYTES = 2**26
_MAX_COUNT = 2**24
_DEFAULT_ALIGNMENT = 32

_SCALARS = {
    0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?",
    10: "<Q", 11: "<q", 12: "<d",
}  # fmt: skip
_STRING, _ARRAY = 8, 9

TENSOR_TYPES: dict[int, tuple[str, int, int]] = {
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 30: ("BF16", 1, 2),
    2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22), 7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34), 9: ("Q8_1", 32, 36),
    10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110), 12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176), 14: ("Q6_K", 256, 210), 15: ("Q8_K", 256, 292),
    16: ("IQ2_XXS", 256, 66), 17: ("IQ2_XS", 256, 74), 18: ("IQ3_XXS", 256, 98),
    19: ("IQ1_S", 256, 50), 20: ("IQ4_NL", 32, 18), 21: ("IQ3_S", 256, 110),
    22: ("IQ2_S", 256, 82), 23: ("IQ4_XS", 256, 136), 29: ("IQ1_M", 256, 56),
    24: ("I8", 1, 1), 25: ("I16", 1, 2), 26: ("I32", 1, 4), 27: ("I64", 1, 8), 28: ("F64", 1, 8),
    34: ("TQ1_0", 256, 54), 35: ("TQ2_0", 256, 66), 39: ("MXFP4", 32, 17),
}  # fmt: skip
"""Name, elements per block and bytes per block, by the number of the type."""


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """One tensor. ``shape`` is row-major (GGUF stores it reversed); ``offset`` is absolute."""

    name: str
    type_name: str
    shape: tuple[int, ...]
    nbytes: int
    offset: int


class GgufFile:
    """An open GGUF file, mapped into memory, with the parts that it is split into.

    Use it in a ``with`` statement.

    Raises:
        K2Error: if the file is not a GGUF, has another version, is truncated or contradicts itself.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metadata: dict[str, Any] = {}
        self.tensors: dict[str, GgufTensor] = {}
        self._maps: list[mmap.mmap] = []
        self._map_of: dict[str, mmap.mmap] = {}
        try:
            for number, part in enumerate(split_parts(path)):
                self._add(part, number)
            self._check_count()
        except BaseException:
            self._close()
            raise

    def _add(self, part: Path, number: int) -> None:
        """Open the file, or one of the parts that it is split into, and take over its header."""
        try:
            with os.fdopen(open_regular(part, follow_links=True), "rb") as stream:
                data = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        except FileNotFoundError as error:
            raise K2Error(
                f"{part} is missing: the model is split, and its parts belong into one folder",
                download_hint(part),
            ) from error
        except OSError as error:
            raise K2Error(f"cannot read {part}: {error.strerror}") from error
        except ValueError as error:  # mmap raises this for an empty file
            raise K2Error(f"{part} is empty", download_hint(part)) from error
        self._maps.append(data)
        metadata, tensors = _HeaderReader(part, data).read()
        said = metadata.get("split.no", number)
        if said != number:
            raise K2Error(f"{part} says that it is part {shown(said)}, counted from 0")
        # Only the first part has the metadata of the model.
        self.metadata = metadata if number == 0 else self.metadata
        for name, tensor in tensors.items():
            if name in self.tensors:
                raise K2Error(f"{part} is damaged: {shown(name)} is in an earlier part too")
            self.tensors[name] = tensor
            self._map_of[name] = data

    def _check_count(self) -> None:
        parts, tensors = self.metadata.get("split.count"), self.metadata.get("split.tensors.count")
        if parts is not None and parts != len(self._maps):
            raise K2Error(
                f"{self.path} is one of {shown(parts)} parts, whose names must end in "
                f"-00001-of-{shown(parts):0>5}.gguf and so on",
                "give the parts the names that they had",
            )
        if tensors is not None and len(self._maps) > 1 and tensors != len(self.tensors):
            raise K2Error(
                f"the parts of {self.path} have {len(self.tensors)} tensors, not {shown(tensors)}",
                download_hint(self.path),
            )

    def _close(self) -> None:
        for data in self._maps:
            data.close()

    def __enter__(self) -> GgufFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._close()

    def data(self, tensor: GgufTensor) -> bytes:
        """Copy the stored bytes of a tensor; a view would keep the file from closing."""
        return self._map_of[tensor.name][tensor.offset : tensor.offset + tensor.nbytes]


class _HeaderReader:
    """Cursor over the mapped header that raises an error at the end of the file."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self._path = path
        self._data = data
        self._at = 0

    def read(self) -> tuple[dict[str, Any], dict[str, GgufTensor]]:
        refuse_pointer(self._path, self._data[:32])
        if self._bytes(4) != b"GGUF":
            raise K2Error(
                f"{self._path} is not a GGUF file: it starts with {self._data[:4]!r}",
                "give a .gguf file that is whole, or a checkpoint folder",
            )
        version = self._scalar("<I")
        if version not in (2, 3):
            detail = " (big-endian)" if version in (2 << 24, 3 << 24) else ""
            raise K2Error(f"{self._path} has GGUF version {version}{detail}; k2 reads 2 and 3")
        tensor_count, pair_count = self._count(), self._count()
        metadata: dict[str, Any] = {}
        for _ in range(pair_count):
            key = self._string()
            metadata[key] = self._value(self._scalar("<I"))
        infos = [self._tensor_info() for _ in range(tensor_count)]
        return metadata, self._locate(metadata, infos)

    def _bytes(self, count: int) -> bytes:
        past = self._at + count
        if past > len(self._data):
            raise K2Error(
                f"{self._path} is cut short: its header goes past byte {len(self._data)}",
                download_hint(self._path),
            )
        if past > _MAX_HEADER_BYTES:
            raise K2Error(
                f"{self._path} is damaged: its header goes past {_MAX_HEADER_BYTES} bytes"
            )
        taken = self._data[self._at : past]
        self._at = past
        return taken

    def _scalar(self, layout: str) -> Any:
        return struct.unpack(layout, self._bytes(struct.calcsize(layout)))[0]

    def _count(self) -> int:
        count: int = self._scalar("<Q")
        if count > _MAX_COUNT:
            raise K2Error(f"{self._path} is damaged: a count of {count} in its header")
        return count

    def _string(self) -> str:
        length: int = self._scalar("<Q")
        if length > _MAX_STRING_BYTES:
            raise K2Error(f"{self._path} is damaged: a string of {length} bytes in its header")
        # Some vocabularies hold tokens that are not UTF-8; their exact bytes are not needed.
        return self._bytes(length).decode("utf-8", "replace")

    def _value(self, kind: int, depth: int = 0) -> Any:
        if kind == _STRING:
            return self._string()
        if kind in _SCALARS:
            return self._scalar(_SCALARS[kind])
        if kind == _ARRAY and depth < 4:
            return self._array(depth)
        raise K2Error(f"{self._path} is damaged: metadata of the unknown type {kind}")

    def _array(self, depth: int) -> list[Any]:
        item_kind: int = self._scalar("<I")
        count = self._count()
        if item_kind not in _SCALARS:
            return [self._value(item_kind, depth + 1) for _ in range(count)]
        layout = _SCALARS[item_kind]
        return list(struct.unpack(f"<{count}{layout[1]}", self._bytes(_size(layout) * count)))

    def _tensor_info(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self._string()
        dimension_count = self._scalar("<I")
        if dimension_count > 8:
            raise K2Error(
                f"{self._path} is damaged: {shown(name)} has {dimension_count} dimensions"
            )
        dimensions = tuple(self._scalar("<Q") for _ in range(dimension_count))
        return name, dimensions[::-1], self._scalar("<I"), self._scalar("<Q")

    def _locate(
        self, metadata: dict[str, Any], infos: list[tuple[str, tuple[int, ...], int, int]]
    ) -> dict[str, GgufTensor]:
        alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or not 0 < alignment <= 2**20:
            raise K2Error(f"{self._path} is damaged: an alignment of {shown(alignment)}")
        data_start = -(-self._at // alignment) * alignment
        tensors: dict[str, GgufTensor] = {}
        for name, shape, type_number, offset in infos:
            if name in tensors:
                raise K2Error(f"{self._path} is damaged: {shown(name)} occurs twice")
            tensors[name] = self._tensor(name, shape, type_number, data_start + offset)
        self._check_overlap(tensors)
        return tensors

    def _tensor(
        self, name: str, shape: tuple[int, ...], type_number: int, offset: int
    ) -> GgufTensor:
        if type_number not in TENSOR_TYPES:
            raise K2Error(f"{self._path}: {shown(name)} has the unknown tensor type {type_number}")
        type_name, block_elements, block_bytes = TENSOR_TYPES[type_number]
        if not shape or shape[-1] % block_elements:
            raise K2Error(
                f"{self._path} is damaged: {shown(name)} of shape {list(shape)} "
                f"does not divide into {type_name} blocks of {block_elements}"
            )
        nbytes = prod(shape) // block_elements * block_bytes
        if offset + nbytes > len(self._data):
            raise K2Error(
                f"{self._path} is cut short: {shown(name)} ends at byte {offset + nbytes}, "
                f"the file at {len(self._data)}",
                download_hint(self._path),
            )
        return GgufTensor(name, type_name, shape, nbytes, offset)

    def _check_overlap(self, tensors: dict[str, GgufTensor]) -> None:
        end = 0
        for tensor in sorted(tensors.values(), key=lambda tensor: tensor.offset):
            if tensor.offset < end:
                raise K2Error(
                    f"{self._path} is damaged: {shown(tensor.name)} overlaps the tensor before it"
                )
            end = tensor.offset + tensor.nbytes


def _size(layout: str) -> int:
    return struct.calcsize(layout)
