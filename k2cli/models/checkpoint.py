"""A checkpoint folder: its config, its index, and the tensors of its weight files.

No tensor data is read. ``safetensors_header`` reads one file, ``layout`` says which weight files
belong to a checkpoint, and ``config_form`` brings the config into the form that mlx-lm reads.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from k2cli.errors import K2Error
from k2cli.files import open_regular
from k2cli.models.config_form import standard_config
from k2cli.models.json_files import (
    end_tokens,
    read_generation_config,
    read_json_object,
    shown,
)
from k2cli.models.layout import (
    INDEX_NAME,
    choose_weight_files,
    download_hint,
    listed,
    names_in,
)
from k2cli.models.part import absent_files, header_path
from k2cli.models.safetensors_header import (
    MAX_DIMENSION,
    StoredTensor,
    header_length,
    read_safetensors_header,
    tensors_of_header,
)

READ_ENDINGS = (".json", ".safetensors", ".jinja", ".tiktoken", ".model", ".txt")
"""Endings of the files of a checkpoint that k2 reads or copies."""

_POSITIVE_INTEGERS = (
    "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "vocab_size", "intermediate_size", "max_position_embeddings",
)  # fmt: skip
"""Fields of a config that k2 computes with."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Config and tensors of a folder. ``stored_bytes`` is the size of all tensors together.

    ``warnings`` say what is wrong with the folder although the model can be read. ``absent`` names
    the weight files that a part of a checkpoint lacks; their tensors are known by their headers.
    """

    folder: Path
    config: dict[str, Any]
    tensors: dict[str, StoredTensor] = field(default_factory=dict)
    stored_bytes: int = 0
    warnings: tuple[str, ...] = ()
    absent: frozenset[str] = frozenset()


def read_checkpoint(folder: Path) -> Checkpoint:
    """Read the config and all headers, but no tensor data.

    A folder without safetensors gives no tensors and 0 bytes. If there is an index, it decides
    which files belong to the checkpoint, unless it is that of other files. Of a part of a
    checkpoint (``models.part``) the headers of absent files are read too.

    Raises:
        K2Error: if the config or a header is missing, malformed or contradicts its file, or if
            a file of the checkpoint is missing, or one that k2 reads or copies is no regular file.
    """
    config = read_config(folder)
    check_regular(folder)
    absent = absent_files(folder)
    tensors, warnings = read_tensors(
        folder,
        [*names_in(folder), *absent],
        read_index(folder),
        lambda names: (
            read_absent_header(folder, name, absent[name])
            if name in absent
            else read_safetensors_header(folder / name)
            for name in names
        ),
    )
    stored_bytes = sum(tensor.nbytes for tensor in tensors.values())
    return Checkpoint(folder, config, tensors, stored_bytes, warnings, frozenset(absent))


def read_tensors(
    where: Path,
    names: Collection[str],
    weight_map: Mapping[str, str] | None,
    read: Callable[[Sequence[str]], Iterable[Mapping[str, StoredTensor]]],
) -> tuple[dict[str, StoredTensor], tuple[str, ...]]:
    """Read the tensors of a folder or repository, and warnings.

    An index that names files which are not there, or places tensors where they are not, is that of
    an earlier conversion. mlx-lm reads no index, so the model can be run all the same.

    Args:
        where: the folder, or the name of the repository.
        names: all its files, by path.
        weight_map: its index, if there is one.
        read: reads the headers of files, by name.

    Raises:
        K2Error: if a file is missing or damaged, or a tensor is in two files.
    """
    chosen = choose_weight_files(names, weight_map, str(where))
    tensors = _united(read(chosen.names))
    if weight_map is None or chosen.warnings:
        return tensors, chosen.warnings
    misplaced = [
        name
        for name, file in weight_map.items()
        if name not in tensors or tensors[name].file.name != file
    ]
    if not misplaced:
        return tensors, ()
    without = choose_weight_files(names, None, str(where))
    if without.names != chosen.names:
        tensors = _united(read(without.names))
    warning = (
        f"{where / INDEX_NAME} is stale: tensor {shown(misplaced[0])} is not in "
        f"{weight_map[misplaced[0]]}; read instead: {listed(list(without.names))}"
    )
    return tensors, (warning,)


def _united(parts: Iterable[Mapping[str, StoredTensor]]) -> dict[str, StoredTensor]:
    tensors: dict[str, StoredTensor] = {}
    for part in parts:
        for name, tensor in part.items():
            if name in tensors:
                raise K2Error(
                    f"tensor {shown(name)} is in both {tensors[name].file} and {tensor.file}",
                    "remove the files that are not of this model",
                )
            tensors[name] = tensor
    return tensors


def check_regular(folder: Path) -> None:
    """Check that the files that k2 reads or copies are regular, so that no reader waits for ever.

    Raises:
        K2Error: for the first one that is a device or a FIFO.
    """
    try:
        with os.scandir(folder) as entries:
            # A link to nothing is told by the reader of the file.
            odd = sorted(
                entry.name
                for entry in entries
                if entry.name.endswith(READ_ENDINGS)
                and not entry.is_file()
                and not entry.is_dir()
                and Path(entry.path).exists()
            )
    except OSError as error:
        raise K2Error(f"cannot read {folder}: {error.strerror}") from error
    if odd:
        raise K2Error(f"cannot read {folder / odd[0]}: it is not a regular file")


def read_config(folder: Path) -> dict[str, Any]:
    """Read ``config.json``; ``eos_token_id`` of ``generation_config.json`` takes precedence.

    Raises:
        K2Error: if it is missing, not a JSON object, or a field that k2 uses has another type or
            an impossible value.
    """
    path = folder / "config.json"
    try:
        config = standard_config(read_json_object(path), str(path))
    except (ArithmeticError, AttributeError, RecursionError, TypeError, ValueError) as error:
        # A member is of another kind than any tool writes; whichever it is, no model has it.
        raise K2Error(f"{path} is not the config of a model: {error}") from error
    return _checked_config(folder, path, config)


def config_for_mlx_lm(folder: Path) -> dict[str, Any]:
    """Read ``config.json`` as it is, unless only the standard form says to mlx-lm what it means.

    Raises:
        K2Error: as ``read_config``.
    """
    config = read_json_object(folder / "config.json")
    parts = (config, config.get("text_config"))
    if any(isinstance(part, dict) and part.get("rope_parameters") for part in parts):
        return read_config(folder)
    return _checked_config(folder, folder / "config.json", config)


def _checked_config(folder: Path, path: Path, config: dict[str, Any]) -> dict[str, Any]:
    """Check a config, and take over the end tokens of ``generation_config.json``."""
    _check_config(path, config, required_model_type=True)
    if "text_config" in config:
        if not isinstance(config["text_config"], dict):
            raise K2Error(f"{path}: text_config must be an object")
        _check_config(path, config["text_config"], required_model_type=False)
    end_tokens(path, config.get("eos_token_id"))
    end = read_generation_config(folder).get("eos_token_id")
    if end is not None:
        config["eos_token_id"] = end
    return config


def _check_config(path: Path, config: dict[str, Any], *, required_model_type: bool) -> None:
    model_type = config.get("model_type")
    if not isinstance(model_type, str) and (required_model_type or model_type is not None):
        raise K2Error(
            f"{path}: model_type must be a string, not {shown(model_type)}", download_hint(path)
        )
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
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value < MAX_DIMENSION


def read_index(folder: Path) -> dict[str, str] | None:
    """Read the index of a folder: the file of each tensor; None if there is none.

    Raises:
        K2Error: if it is malformed.
    """
    path = folder / INDEX_NAME
    if not os.path.lexists(path):
        return None
    return weight_map_of(path, read_json_object(path))


def _is_file_name(text: str) -> bool:
    """True for the name of a file: one with a path in it could point anywhere on this machine."""
    return Path(text).name == text and text.isprintable() and len(text.encode()) <= 255


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
        # A name with a path in it could point anywhere on this machine.
        if not _is_file_name(file) or not file.endswith(".safetensors"):
            raise K2Error(f"{path}: {shown(file)} is not the name of a safetensors file")
    return weight_map


def read_absent_header(folder: Path, name: str, size: int) -> dict[str, StoredTensor]:
    """Read the tensors of a file that a part of a checkpoint lacks; ``size`` is the file's.

    Raises:
        K2Error: as ``read_safetensors_header``.
    """
    copy = header_path(folder, name)
    try:
        with os.fdopen(open_regular(copy), "rb") as stream:
            length = header_length(copy, stream.read(8), size)
            return tensors_of_header(folder / name, stream.read(length), size)
    except OSError as error:
        raise K2Error(f"cannot read {copy}: {error.strerror}") from error
