"""Config and tensor headers of a checkpoint folder: names, types, shapes, files and offsets.

The safetensors format is read here without its library, because planning and the coverage check
need offsets and sizes, not data, and because a header may be wrong: every length and offset is
checked against the size of the file before it is used.
"""

from __future__ import annotations

import json
import os
import struct
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any, TypeGuard

from k2cli.errors import K2Error
from k2cli.files import open_regular, read_regular

MAX_HEADER_BYTES = 100_000_000
"""Limit of the safetensors library; the largest header of K2 has about 3 MB."""

_MAX_JSON_BYTES = 50_000_000
_MAX_DIMENSION = 2**48
_LARGEST_TOKEN = 2**31 - 1
_MAX_DIMENSIONS = 16
INDEX_NAME = "model.safetensors.index.json"

DTYPE_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8,
    "U16": 16, "I16": 16, "F16": 16, "BF16": 16,
    "U32": 32, "I32": 32, "F32": 32,
    "U64": 64, "I64": 64, "F64": 64, "C64": 64,
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip
"""Bits per element, by the type's name in safetensors."""

_POSITIVE_INTEGERS = (
    "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "vocab_size", "intermediate_size", "max_position_embeddings",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One stored tensor. ``offset`` counts bytes from the start of ``file``."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    file: Path
    offset: int


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Config and tensors of a folder. ``stored_bytes`` is the size of all tensors together."""

    folder: Path
    config: dict[str, Any]
    tensors: dict[str, StoredTensor] = field(default_factory=dict)
    stored_bytes: int = 0


def read_checkpoint(folder: Path) -> Checkpoint:
    """Read the config and all headers, but no tensor data.

    A folder without safetensors gives no tensors and 0 bytes. If there is an index, it decides
    which files belong to the checkpoint.

    Raises:
        K2Error: if the config or a header is missing, malformed or contradicts its file, or if
            the index names a tensor that its file does not hold.
    """
    config = read_config(folder)
    weight_map = _read_index(folder)
    if weight_map is None:
        # A folder may also hold adapters; mlx-lm takes only files whose name starts with 'model'.
        files = sorted(folder.glob("model*.safetensors")) or sorted(folder.glob("*.safetensors"))
    else:
        files = [folder / name for name in sorted(set(weight_map.values()))]
    tensors: dict[str, StoredTensor] = {}
    for file in files:
        for name, tensor in read_safetensors_header(file).items():
            if name in tensors:
                raise K2Error(f"tensor {shown(name)} is in both {tensors[name].file} and {file}")
            tensors[name] = tensor
    if weight_map is not None:
        check_index(folder / INDEX_NAME, weight_map, tensors)
    return Checkpoint(folder, config, tensors, sum(t.nbytes for t in tensors.values()))


def read_config(folder: Path) -> dict[str, Any]:
    """Read ``config.json``; ``eos_token_id`` of ``generation_config.json`` takes precedence.

    Raises:
        K2Error: if it is missing, not a JSON object, or a field that k2 uses has another type.
    """
    path = folder / "config.json"
    config = read_json_object(path)
    _check_config(path, config, required_model_type=True)
    if "text_config" in config:
        if not isinstance(config["text_config"], dict):
            raise K2Error(f"{path}: text_config must be an object")
        _check_config(path, config["text_config"], required_model_type=False)
    generation = folder / "generation_config.json"
    if generation.exists():
        end = read_json_object(generation).get("eos_token_id")
        if end is not None:
            config["eos_token_id"] = end
    end_tokens(path, config.get("eos_token_id"))
    return config


def read_json_object(path: Path) -> dict[str, Any]:
    """Read a JSON file of at most 50 MB that holds an object.

    Raises:
        K2Error: if it cannot be read, is too long, or does not hold a JSON object.
    """
    try:
        document = json.loads(read_regular(path, _MAX_JSON_BYTES, follow_links=True))
    except OSError as error:
        raise K2Error(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise K2Error(f"{path} is not JSON: {error}", "download the checkpoint again") from error
    if not isinstance(document, dict):
        raise K2Error(f"{path} must hold a JSON object, not {type(document).__name__}")
    return document


def _check_config(path: Path, config: dict[str, Any], *, required_model_type: bool) -> None:
    model_type = config.get("model_type")
    if not isinstance(model_type, str) and (required_model_type or model_type is not None):
        raise K2Error(f"{path}: model_type must be a string, not {shown(model_type)}")
    for name in _POSITIVE_INTEGERS:
        value = config.get(name)
        # Some architectures have one number per layer.
        values = value if isinstance(value, list) else [] if value is None else [value]
        if not all(_is_size(each) for each in values):
            raise K2Error(f"{path}: {name} must be a positive integer, not {shown(value)}")
    for name in ("quantization", "quantization_config", "rope_scaling"):
        if config.get(name) is not None and not isinstance(config[name], dict):
            raise K2Error(f"{path}: {name} must be an object, not {shown(config[name])}")


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value < _MAX_DIMENSION


def shown(value: object) -> str:
    """Format any JSON value for a message, in at most 60 characters."""
    # JSON may hold an integer of thousands of digits, for which str() raises.
    if isinstance(value, int) and abs(value) > 10**30:
        return f"a number of about {value.bit_length()} bits"
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # such an integer inside a list
        return f"this {type(value).__name__}"
    return text if len(text) <= 60 else f"{text[:60]}..."


def end_tokens(path: Path, value: object) -> list[int]:
    """Return ``eos_token_id`` as a list; configs hold one, several or none.

    ``path`` is for messages.

    Raises:
        K2Error: if it is neither an integer nor a list of integers.
    """
    tokens: list[Any] = value if isinstance(value, list) else [] if value is None else [value]
    if any(
        isinstance(token, bool) or not isinstance(token, int) or abs(token) > _LARGEST_TOKEN
        for token in tokens
    ):
        raise K2Error(
            f"{path}: eos_token_id must be an integer or a list of them, not {shown(value)}"
        )
    return tokens


def _read_index(folder: Path) -> dict[str, str] | None:
    path = folder / INDEX_NAME
    if not path.exists():
        return None
    weight_map = weight_map_of(path, read_json_object(path))
    for file in set(weight_map.values()):
        if not (folder / file).is_file():
            raise K2Error(f"{path} names {file}, which is not there", "download it again")
    return weight_map


def weight_map_of(path: Path, index: dict[str, Any]) -> dict[str, str]:
    """Return the file name of each tensor in an index. ``path`` is for messages.

    Raises:
        K2Error: if the map is missing or malformed, or a name is not that of a safetensors file.
    """
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not all(
        isinstance(file, str) for file in weight_map.values()
    ):
        raise K2Error(f"{path}: weight_map must map tensor names to file names")
    for file in set(weight_map.values()):
        if not _is_file_name(file) or not file.endswith(".safetensors"):
            raise K2Error(f"{path}: {shown(file)} is not the name of a safetensors file")
    return weight_map


def _is_file_name(text: str) -> bool:
    """True for the name of a file: one with a path in it could point anywhere on this machine."""
    return Path(text).name == text and text.isprintable() and len(text.encode()) <= 255


def check_index(path: Path, weight_map: dict[str, str], tensors: dict[str, StoredTensor]) -> None:
    """Check that each tensor of an index is stored in the file that the index names.

    Raises:
        K2Error: for the first tensor that is not.
    """
    for name, file in weight_map.items():
        tensor = tensors.get(name)
        if tensor is None or tensor.file.name != file:
            raise K2Error(f"{path}: tensor {shown(name)} is not in {file}")


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
        raise K2Error(f"{file} is cut short: {size} bytes hold no header", "download it again")
    (length,) = struct.unpack("<Q", prefix[:8])
    if length > MAX_HEADER_BYTES:
        raise K2Error(f"{file} is no safetensors file: its header would have {length} bytes")
    if 8 + length > size:
        raise K2Error(
            f"{file} is cut short: its header has {length} bytes, the file {size}",
            "download it again",
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
        isinstance(item, int) and not isinstance(item, bool) and 0 <= item < _MAX_DIMENSION
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
            "download it again",
        )
    if end < size:
        raise K2Error(f"{file} has {size - end} bytes after its last tensor")
