"""Headers of safetensors files: the name, type, shape and place of each tensor.

The format is read here without its library, because planning and the coverage check need offsets
and sizes, not data, and because a header may be wrong: every length and offset is checked against
the size of the file before it is used. ``safetensors_writer`` writes such files.
"""

from __future__ import annotations

import json
import os
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, TypeGuard

from k2cli.errors import K2Error
from k2cli.files import open_regular
from k2cli.models.json_files import shown
from k2cli.models.layout import download_hint, refuse_pointer

MAX_HEADER_BYTES = 100_000_000
"""Limit of the safetensors library; the largest header of K2 has about 3 MB."""

MAX_DIMENSION = 2**48
"""Limit of one dimension of a shape, and of an offset in bytes, far above those of all models."""

_MAX_DIMENSIONS = 16
"""Limit of the number of dimensions; models have up to five."""

DTYPE_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8,
    "U16": 16, "I16": 16, "F16": 16, "BF16": 16,
    "U32": 32, "I32": 32, "F32": 32,
    "U64": 64, "I64": 64, "F64": 64, "C64": 64,
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip
"""Bits per element, by the type's name in safetensors."""


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One stored tensor. ``offset`` counts bytes from the start of ``file``."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    file: Path
    offset: int


def read_safetensors_header(file: Path) -> dict[str, StoredTensor]:
    """Read the tensors of one file, by name, in the order of their data.

    Raises:
        K2Error: if the file is cut short, or its header is malformed or does not describe exactly
            the bytes that follow it.
    """
    try:
        with os.fdopen(open_regular(file, follow_links=True), "rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            length = header_length(file, stream.read(8), size)
            return tensors_of_header(file, stream.read(length), size)
    except OSError as error:
        raise K2Error(f"cannot read {file}: {error.strerror}") from error


def header_length(file: Path, prefix: bytes, size: int) -> int:
    """Return the length of a header from its 8-byte ``prefix``; ``size`` is that of the file.

    Raises:
        K2Error: if the file cannot hold such a header.
    """
    if len(prefix) < 8:
        raise K2Error(f"{file} is cut short: {size} bytes hold no header", download_hint(file))
    refuse_pointer(file, prefix)
    (length,) = struct.unpack("<Q", prefix[:8])
    if length > MAX_HEADER_BYTES:
        raise K2Error(f"{file} is no safetensors file: its header would have {length} bytes")
    if 8 + length > size:
        raise K2Error(
            f"{file} is cut short: its header has {length} bytes, the file {size}",
            download_hint(file),
        )
    return int(length)


def tensors_of_header(file: Path, text: bytes, size: int) -> dict[str, StoredTensor]:
    """Parse the JSON of a header into tensors; ``size`` is that of the file.

    Raises:
        K2Error: if it is malformed, or does not describe exactly the bytes that follow it.
    """
    try:
        header = json.loads(text, object_pairs_hook=_unique_keys)
    except (ValueError, RecursionError) as error:
        raise K2Error(f"{file}: the header is not JSON: {error}") from error
    if not isinstance(header, dict):
        raise K2Error(f"{file}: the header is not a JSON object")
    data_start = 8 + len(text)
    tensors = [
        _tensor(file, name, fields, data_start)
        for name, fields in header.items()
        if name != "__metadata__"
    ]
    tensors.sort(key=lambda tensor: (tensor.offset, tensor.nbytes))
    _check_layout(file, tensors, data_start, size)
    return {tensor.name: tensor for tensor in tensors}


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise ValueError("a name occurs twice")
    return fields


def _tensor(file: Path, name: str, fields: Any, data_start: int) -> StoredTensor:
    where = f"{file}: tensor {shown(name)}"
    if not isinstance(fields, dict):
        raise K2Error(f"{where} is not described by an object")
    dtype, shape, offsets = fields.get("dtype"), fields.get("shape"), fields.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise K2Error(f"{where} has the unknown dtype {shown(dtype)}")
    if not _is_sizes(shape) or len(shape) > _MAX_DIMENSIONS:
        raise K2Error(f"{where} has the shape {shown(shape)}")
    if not _is_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise K2Error(f"{where} has the data_offsets {shown(offsets)}")
    bits = prod(shape) * DTYPE_BITS[dtype]
    nbytes = offsets[1] - offsets[0]
    if bits != nbytes * 8:
        raise K2Error(
            f"{where} of shape {shape} and dtype {dtype} has {bits} bits, "
            f"but its offsets span {nbytes} bytes"
        )
    return StoredTensor(name, dtype, tuple(shape), nbytes, file, data_start + offsets[0])


def _is_sizes(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(
        isinstance(item, int) and not isinstance(item, bool) and 0 <= item < MAX_DIMENSION
        for item in value
    )


def _check_layout(file: Path, tensors: list[StoredTensor], data_start: int, size: int) -> None:
    """Check that tensors have no gaps or overlaps and end at the end of the file."""
    end = data_start
    for tensor in tensors:
        if tensor.offset != end:
            problem = "overlaps the one before it" if tensor.offset < end else "leaves a gap"
            raise K2Error(f"{file}: tensor {shown(tensor.name)} {problem} at byte {tensor.offset}")
        end += tensor.nbytes
    if end > size:
        raise K2Error(
            f"{file} is cut short: its tensors end at byte {end}, the file at {size}",
            download_hint(file),
        )
    if end < size:
        raise K2Error(f"{file} has {size - end} bytes after its last tensor")
