"""Conversion of a GGUF file to an MLX checkpoint folder.

Tensors in a quantization that MLX also has stay packed bit for bit (see ``gguf.blocks``), so the
result is the same model and no larger. The folder appears complete or not at all.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from k2cli.errors import K2Error
from k2cli.models.checkpoint import Checkpoint
from k2cli.models.files import folder_being_made
from k2cli.models.gguf.blocks import (
    EXPANDED_TYPES,
    GROUP_SIZE,
    PACKED_BITS,
    PLAIN_TYPES,
    expand,
    repack,
)
from k2cli.models.gguf.llama import LlamaShape, llama_config, llama_names, llama_shape
from k2cli.models.gguf.llama import original_rows as llama_original_rows
from k2cli.models.gguf.reader import GgufFile, GgufTensor
from k2cli.models.gguf.tokenizer import tokenizer_files
from k2cli.models.json_files import shown
from k2cli.models.safetensors_header import StoredTensor
from k2cli.models.safetensors_writer import TensorSpec, write_safetensors

if TYPE_CHECKING:
    from numpy.typing import NDArray

Progress = Callable[[int, int], None]
"""Callback that takes the bytes done and the total bytes."""


@dataclass(frozen=True, slots=True)
class _Conversion:
    """One GGUF tensor and the tensors that it is converted to."""

    source: GgufTensor
    specs: tuple[TensorSpec, ...]


def convert_gguf(
    path: Path,
    folder: Path,
    *,
    progress: Progress | None = None,
    extra_files: dict[str, str] | None = None,
    sampling: Mapping[str, float] | None = None,
) -> Path:
    """Convert ``path`` into a new checkpoint at ``folder`` and return the folder.

    Args:
        path: the GGUF file; architecture llama.
        folder: the new checkpoint; must not exist.
        progress: called with the number of bytes of the GGUF that are converted.
        extra_files: further text files for the folder, by name.
        sampling: defaults such as ``temperature``, for generation_config.json.

    Raises:
        K2Error: if the file is damaged or its kind is not supported, or the disk is full.
    """
    with GgufFile(path) as file:
        shape, conversions, config = _planned(file)
        documents = {"config.json": config} | tokenizer_files(file, shape.vocabulary)
        documents["generation_config.json"] |= dict(sampling or {})
        specs = [spec for conversion in conversions for spec in conversion.specs]
        with folder_being_made(folder) as temporary:
            for name, document in documents.items():
                text = json.dumps(document, indent=1, ensure_ascii=False)
                (temporary / name).write_text(text + "\n", encoding="utf-8")
            for name, text in (extra_files or {}).items():
                (temporary / name).write_text(text, encoding="utf-8")
            arrays = _arrays(file, conversions, shape, progress or (lambda done, total: None))
            write_safetensors(temporary, specs, arrays)
    return folder


def gguf_checkpoint(path: Path) -> Checkpoint:
    """Describe the checkpoint that ``convert_gguf`` would make, from the file's header alone.

    Raises:
        K2Error: as ``convert_gguf``.
    """
    with GgufFile(path) as file:
        _, conversions, config = _planned(file)
    specs = [spec for conversion in conversions for spec in conversion.specs]
    # These tensors are not stored yet, so they have no offset.
    tensors = {
        spec.name: StoredTensor(spec.name, spec.dtype, spec.shape, spec.nbytes, path, 0)
        for spec in specs
    }
    return Checkpoint(path, config, tensors, sum(spec.nbytes for spec in specs))


def _planned(file: GgufFile) -> tuple[LlamaShape, list[_Conversion], dict[str, Any]]:
    """Plan the conversion of each tensor, and make the config."""
    architecture = file.metadata.get("general.architecture")
    if architecture != "llama":
        raise K2Error(
            f"{file.path} is of the architecture {shown(architecture)}; k2 imports GGUF files of "
            "'llama'",
            "give an MLX or Hugging Face checkpoint of this model instead",
        )
    shape = llama_shape(file)
    names = llama_names(file, shape)
    conversions = [_plan(file, file.tensors[name], target, shape) for name, target in names.items()]
    return shape, conversions, llama_config(file, shape, names) | _quantization(conversions)


def _plan(file: GgufFile, tensor: GgufTensor, target: str, shape: LlamaShape) -> _Conversion:
    kind = tensor.type_name
    if kind in PLAIN_TYPES:
        return _Conversion(tensor, (TensorSpec(target, kind, tensor.shape),))
    if kind in EXPANDED_TYPES:
        return _Conversion(tensor, (TensorSpec(target, "F16", tensor.shape),))
    if kind not in PACKED_BITS:
        known = ", ".join((*PLAIN_TYPES, *PACKED_BITS, *EXPANDED_TYPES))
        raise K2Error(f"{file.path}: {shown(tensor.name)} is {kind}, k2 imports {known}")
    rows, columns = tensor.shape
    module = target.removesuffix(".weight")
    groups = (rows, columns // GROUP_SIZE)
    return _Conversion(
        tensor,
        (
            TensorSpec(target, "U32", (rows, columns * PACKED_BITS[kind] // 32)),
            TensorSpec(f"{module}.scales", "F16", groups),
            TensorSpec(f"{module}.biases", "F16", groups),
        ),
    )


def _quantization(conversions: list[_Conversion]) -> dict[str, Any]:
    """Make mlx-lm's ``quantization`` entry: the most common bits, and modules that differ."""
    bits = {
        conversion.specs[0].name.removesuffix(".weight"): PACKED_BITS.get(
            conversion.source.type_name, 0
        )
        for conversion in conversions
        if len(conversion.source.shape) == 2
    }
    packed = [value for value in bits.values() if value]
    if not packed:
        return {}
    usual = max(set(packed), key=packed.count)
    quantization: dict[str, Any] = {"group_size": GROUP_SIZE, "bits": usual, "mode": "affine"}
    for module, value in bits.items():
        if value == 0:
            quantization[module] = False
        elif value != usual:
            quantization[module] = {"group_size": GROUP_SIZE, "bits": value, "mode": "affine"}
    return {"quantization": quantization}


def _arrays(
    file: GgufFile, conversions: list[_Conversion], shape: LlamaShape, progress: Progress
) -> Iterator[NDArray[Any]]:
    """Yield the data of all specs in order; one GGUF tensor is in memory at a time."""
    total = sum(conversion.source.nbytes for conversion in conversions)
    done = 0
    for conversion in conversions:
        arrays = _converted(file, conversion.source, shape)
        done += conversion.source.nbytes
        progress(done, total)
        yield from arrays


def _converted(file: GgufFile, tensor: GgufTensor, shape: LlamaShape) -> tuple[NDArray[Any], ...]:
    import numpy as np

    rows = tensor.shape[0] if len(tensor.shape) > 1 or tensor.name.endswith(".bias") else 1
    raw = np.frombuffer(file.data(tensor), np.uint8).reshape(rows, -1)
    raw = llama_original_rows(tensor.name, raw, shape)
    try:
        if tensor.type_name in PACKED_BITS:
            return repack(tensor.type_name, raw)
        if tensor.type_name in EXPANDED_TYPES:
            return (expand(tensor.type_name, raw),)
    except OverflowError as error:
        raise K2Error(f"{file.path} is damaged: in {shown(tensor.name)}, {error}") from error
    return (raw,)
