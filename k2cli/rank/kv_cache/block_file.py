"""Files of the prefix cache on disk: the caches of one block of tokens, on one rank.

A file is in safetensors format. Its metadata has a SHA-256 of its place (store, rank, scope and
name), the layout and the data, so that a file that is cut short, damaged, or in the place of
another is never used. It gets its name when all of it is on the disk.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import msgspec

from k2cli.errors import K2Error
from k2cli.files import decode_json, open_regular
from k2cli.models.safetensors_header import StoredTensor, header_length, tensors_of_header
from k2cli.prefix_folder import BLOCK_TOKENS, PART_MARK
from k2cli.rank.array_bytes import array_bytes
from k2cli.rank.kv_cache.segments import Segment

_NAME = re.compile(r"(\d{1,5})\.(\d{1,2})\.(\d{1,2})")
_MOST_BYTES = 2**30
"""Far more than 256 tokens of any model: 135 MB of Llama 405B in bfloat16, 18 MB of Kimi K2."""

_DTYPES = {
    "F32": mx.float32, "F16": mx.float16, "BF16": mx.bfloat16, "U8": mx.uint8, "I8": mx.int8,
    "U16": mx.uint16, "I16": mx.int16, "U32": mx.uint32, "I32": mx.int32,
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


@dataclass(frozen=True, slots=True)
class HostArray:
    """An array in host memory: its place (layer, cache, array), type, shape and bytes."""

    place: tuple[int, int, int]
    dtype: str
    shape: tuple[int, ...]
    data: bytes | memoryview


def to_host(layers: list[Segment]) -> list[HostArray]:
    """Copy the segments of all layers to host memory, so that no other thread needs MLX.

    Raises:
        K2Error: if a type has no name in the format.
    """
    return [
        HostArray(
            (layer, cache, index),
            _type_name(array.dtype),
            tuple(array.shape),
            bytes(array_bytes(array)),
        )
        for layer, segment in enumerate(layers)
        for cache, arrays in enumerate(segment)
        for index, array in enumerate(arrays)
    ]


def _type_name(dtype: mx.Dtype) -> str:
    try:
        return _NAMES[dtype]
    except KeyError:
        raise K2Error(f"a cache of type {dtype} cannot be stored") from None


def from_host(arrays: list[HostArray]) -> list[Segment]:
    """Make segments for all layers; the opposite of ``to_host``."""
    layers: dict[int, dict[int, list[mx.array]]] = {}
    for array in arrays:
        layer, cache, _ = array.place
        layers.setdefault(layer, {}).setdefault(cache, []).append(_array(array))
    return [[tuple(found[cache]) for cache in sorted(found)] for _, found in sorted(layers.items())]


def _array(array: HostArray) -> mx.array:
    dtype = _DTYPES[array.dtype]
    if not prod(array.shape):
        return mx.zeros(array.shape, dtype)
    # MLX takes ``bytes`` for a list of numbers, and a buffer although its type stub says otherwise.
    flat = mx.array(cast("Any", memoryview(array.data)))
    return flat.view(dtype).reshape(array.shape)


class _Header(msgspec.Struct):
    metadata: dict[str, str] = msgspec.field(name="__metadata__", default_factory=dict)


# --- writing ------------------------------------------------------------------------------------


def write_block(path: Path, arrays: list[HostArray]) -> tuple[int, bool]:
    """Write a block. The folder of its scope is made if need be.

    Returns:
        The bytes of the file, and True if nobody else has changed that folder meanwhile, as far as
        the times of the file system tell.

    Raises:
        FileNotFoundError: if the folder of the store is not there.
        OSError: if it cannot be written; then there is no file of that name, and no part of one.
    """
    header = _header(path, arrays)
    path.parent.mkdir(mode=0o700, exist_ok=True)
    partial = path.with_name(f"{PART_MARK}{path.name}-{os.urandom(4).hex()}")
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
    try:
        with os.fdopen(open_regular(partial, flags, mode=0o600), "wb") as file:
            began = path.parent.stat().st_mtime_ns
            file.write(header)
            for array in arrays:
                file.write(array.data)
            file.flush()
            os.fsync(file.fileno())
            size = file.tell()
        undisturbed = path.parent.stat().st_mtime_ns == began
        partial.rename(path)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise
    return size, undisturbed


def _header(path: Path, arrays: list[HostArray]) -> bytes:
    fields: dict[str, Any] = {
        "__metadata__": {"format": "mlx", "k2_sha256": _checksum(path, arrays)}
    }
    position = 0
    for array in arrays:
        end = position + len(array.data)
        fields[".".join(map(str, array.place))] = {
            "dtype": array.dtype,
            "shape": list(array.shape),
            "data_offsets": [position, end],
        }
        position = end
    text = json.dumps(fields, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _checksum(path: Path, arrays: list[HostArray]) -> str:
    """Return the SHA-256 of the file's place, and the arrays' places, types, shapes and data."""
    digest = hashlib.sha256(os.fsencode("/".join(path.parts[-3:]) + "\n"))
    for array in arrays:
        digest.update(f"{array.place} {array.dtype} {array.shape} ".encode())
        digest.update(array.data)
    return digest.hexdigest()


# --- reading ------------------------------------------------------------------------------------


def read_block(path: Path, layers: int) -> list[HostArray]:
    """Read a block of a number of layers, and compare its checksum.

    Raises:
        OSError: if it cannot be read.
        K2Error: if it is not a whole block as it was written.
        msgspec.DecodeError: if its header has another form.
    """
    with os.fdopen(open_regular(path), "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size > _MOST_BYTES:
            raise K2Error(f"{path} has {size} bytes")
        length = header_length(path, file.read(8), size)
        text = file.read(length)
        tensors = tensors_of_header(path, text, size)
        data = memoryview(file.read(size - 8 - length))
    arrays = list(_arrays(path, tensors, data, 8 + length))
    metadata = decode_json(text, _Header).metadata
    if metadata.get("k2_sha256") != _checksum(path, arrays):
        raise K2Error(f"{path} is damaged: its checksum is another")
    if {array.place[0] for array in arrays} != set(range(layers)):
        raise K2Error(f"{path} has other layers than this rank")
    return arrays


def _arrays(
    path: Path, tensors: dict[str, StoredTensor], data: memoryview, start: int
) -> Iterator[HostArray]:
    for name, tensor in tensors.items():
        match = _NAME.fullmatch(name)
        if match is None or tensor.dtype not in _DTYPES or tensor.shape[-2:-1] != (BLOCK_TOKENS,):
            raise K2Error(f"{path} is no block of caches")
        offset = tensor.offset - start
        layer, cache, index = (int(number) for number in match.groups())
        part = data[offset : offset + tensor.nbytes]
        if len(part) != tensor.nbytes:
            raise K2Error(f"{path} is cut short")
        yield HostArray((layer, cache, index), tensor.dtype, tensor.shape, part)
