"""State of a model's folder: the files that it has and lacks, and the words of its config."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from k2cli.errors import K2Error
from k2cli.models.completeness import is_complete
from k2cli.models.inventory.stored_model import ModelFile, State
from k2cli.models.json_files import read_json_if_present
from k2cli.models.layout import INDEX_NAME
from k2cli.models.part import FOLDER, absent_files
from k2cli.models.quantization import describe_quantization, short_format
from k2cli.models.sources.snapshot_record import SnapshotRecord
from k2cli.units import one_line

_WEIGHTS = ".safetensors"
_MAX_LETTERS = 100


@dataclass(frozen=True, slots=True)
class Contents:
    """State of a folder, and its files: those that are here, and those that it lacks."""

    state: State
    missing_bytes: int | None
    files: tuple[ModelFile, ...]


def contents_of(
    folder: Path,
    present: Mapping[str, int],
    broken: int,
    record: SnapshotRecord | None,
    partial_bytes: Mapping[str, int],
) -> Contents:
    """Compare what a folder has with what it must have.

    Args:
        folder: the model's folder.
        present: the bytes of each file that is there, by name.
        broken: the number of files whose data are missing.
        record: the files that it must have; None if that is not known.
        partial_bytes: the bytes of unfinished files, by the hash of the whole file, or by name.
    """
    expected = {file.name: file for file in record.files} if record is not None else {}
    lacking = [file for file in expected.values() if present.get(file.name) != file.nbytes]
    absent: dict[str, int] = {}
    with suppress(K2Error):
        absent = absent_files(folder)
    begun = {
        file.name: min(
            file.nbytes, partial_bytes.get(file.blob_name, partial_bytes.get(file.name, 0))
        )
        for file in lacking
    }
    files = _listed(present, {file.name: file.nbytes for file in lacking} | absent, begun)
    whole = is_complete(folder)
    if absent and not whole and is_complete(folder, part=True):
        return Contents("part", sum(absent.values()), files)
    if whole and not lacking and not broken:
        return Contents("complete", 0, files)
    weights = any(name.endswith(_WEIGHTS) for name in present)
    known = weights or any(name.endswith(_WEIGHTS) for name in expected) or INDEX_NAME in present
    if not known and any(_is_weights(name) for name in present):
        return Contents("other", None, files)
    missing: int | None = sum(file.nbytes for file in lacking) if lacking else None
    if missing is None and not broken:
        missing = _missing_of_index(folder, present)
    if missing is not None:
        got = sum(begun.values())
        got = got or (0 if lacking else sum(partial_bytes.values()))
        missing = max(0, missing - got)
    config_only = "config.json" in present and not (weights or partial_bytes or broken)
    return Contents("config" if config_only else "incomplete", missing, files)


def _is_weights(name: str) -> bool:
    return name.endswith((".bin", ".gguf", ".pt", ".pth", ".onnx", ".h5", ".msgpack", ".npz"))


def _listed(
    present: Mapping[str, int], lacking: Mapping[str, int], begun: Mapping[str, int]
) -> tuple[ModelFile, ...]:
    shown = {name: size for name, size in present.items() if not name.startswith(f"{FOLDER}/")}
    files = [ModelFile(name, size, True) for name, size in shown.items() if name not in lacking]
    files += [ModelFile(name, size, False, begun.get(name, 0)) for name, size in lacking.items()]
    return tuple(sorted(files, key=lambda file: file.name))


def _missing_of_index(folder: Path, present: Mapping[str, int]) -> int | None:
    """Return the bytes of weights that the index counts and the folder lacks, if it counts them."""
    with suppress(K2Error):
        metadata = read_json_if_present(folder / INDEX_NAME).get("metadata")
        total = metadata.get("total_size") if isinstance(metadata, Mapping) else None
        if isinstance(total, int | float) and 0 < total < 2**60:
            here = sum(size for name, size in present.items() if name.endswith(_WEIGHTS))
            return max(0, int(total) - here)
    return None


@dataclass(frozen=True, slots=True)
class Description:
    """Description of a model by its config, for people to read; empty where it says nothing."""

    format: str = ""
    architecture: str = ""
    quantization: str = ""


def describe_config(folder: Path) -> Description:
    """Describe the model of a folder by its config, which may be absent or damaged."""
    try:
        config = read_json_if_present(folder / "config.json")
    except K2Error:
        return Description()
    if not config:
        return Description()
    return Description(
        _short(short_format(config)),
        _short(_architecture(config)),
        _short(describe_quantization(config)),
    )


def _architecture(config: Mapping[str, Any]) -> str:
    named = config.get("architectures")
    first = named[0] if isinstance(named, list) and named and isinstance(named[0], str) else ""
    kind = config.get("model_type")
    text = config.get("text_config")
    layers = next(
        (
            found
            for fields in (config, text if isinstance(text, Mapping) else {})
            if isinstance(found := fields.get("num_hidden_layers"), int)
        ),
        None,
    )
    parts = [first or (kind if isinstance(kind, str) else "")]
    if first and isinstance(kind, str):
        parts = [f"{first} ({kind})"]
    if layers is not None:
        parts.append(f"{layers} layers")
    return ", ".join(part for part in parts if part)


def _short(text: str) -> str:
    return one_line(text)[:_MAX_LETTERS]
