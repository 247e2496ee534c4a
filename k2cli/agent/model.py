"""Checkpoints on this machine: headers to plan from, and a digest to compare."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import msgspec

from k2cli.errors import K2Error
from k2cli.files import open_regular
from k2cli.models.part import absent_files, header_path

_MAX_HEADER_BYTES = 100_000_000
_MAX_JSON_BYTES = 50_000_000
_COPIED_WHOLE = ("config.json", "generation_config.json", "model.safetensors.index.json")


class FileHead(msgspec.Struct, frozen=True):
    """A file's name, its size in bytes, and the part of its start that planning reads."""

    name: str
    size: int
    head: bytes


class CheckpointHeads(msgspec.Struct, frozen=True):
    """A node's checkpoint without data: its folder and files, or the problem."""

    folder: str = ""
    files: tuple[FileHead, ...] = ()
    problem: str = ""


class ModelCopy(msgspec.Struct, frozen=True):
    """A node's checkpoint: its folder and the digest of config and headers, or the problem.

    ``absent`` are the weight files that a part of a checkpoint lacks, with their sizes.
    """

    folder: str = ""
    digest: str = ""
    problem: str = ""
    absent: dict[str, int] = {}


def checkpoint_heads(reference: str) -> CheckpointHeads:
    """Read the config and the headers of a model on this machine."""
    from k2cli.models.checkpoint import read_checkpoint
    from k2cli.models.reference import local_checkpoint

    try:
        folder = local_checkpoint(reference, part=True).resolve()
        checkpoint = read_checkpoint(folder)
    except K2Error as error:
        return CheckpointHeads(problem=error.message)
    files = {tensor.file for tensor in checkpoint.tensors.values()}
    whole = [folder / name for name in _COPIED_WHOLE if (folder / name).is_file()]
    try:
        heads = [_head(path, None) for path in whole]
        for path in sorted(files):
            if path.name in checkpoint.absent:
                copy = _head(header_path(folder, path.name), _MAX_HEADER_BYTES)
                size = absent_files(folder)[path.name]
                heads.append(FileHead(path.name, size, copy.head))
            else:
                heads.append(_head(path, _MAX_HEADER_BYTES))
    except OSError as error:
        return CheckpointHeads(problem=f"cannot read {error.filename}: {error.strerror}")
    return CheckpointHeads(str(folder), tuple(heads))


def _head(path: Path, header_bytes: int | None) -> FileHead:
    """Read a whole JSON file, or the header of a safetensors file of at most so many bytes."""
    with os.fdopen(open_regular(path, follow_links=True), "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if header_bytes is None:
            return FileHead(path.name, size, file.read(_MAX_JSON_BYTES))
        # The first eight bytes are the header's length; read_checkpoint has checked it.
        start = file.read(8)
        length = min(int.from_bytes(start, "little"), header_bytes)
        return FileHead(path.name, size, start + file.read(length))


def find_checkpoint(reference: str, folder: str) -> ModelCopy:
    """Find a model in this machine's own store, or else in the folder that the launcher has it in.

    A reference that is a path is tried after the folder.
    """
    from k2cli.models.reference import local_checkpoint

    problem = ""
    is_path = reference.startswith("/")
    for text in dict.fromkeys((folder, reference) if is_path else (reference, folder)):
        try:
            found = local_checkpoint(text, part=True).resolve()
            return model_copy(found)
        except K2Error as error:
            # Report the problem with the reference, which the user knows, unlike the folder.
            if text == reference or not problem:
                problem = error.message
    return ModelCopy(problem=problem)


def model_copy(folder: Path) -> ModelCopy:
    """Describe the checkpoint in a folder of this machine.

    Raises:
        K2Error: if it is damaged.
    """
    return ModelCopy(str(folder), checkpoint_digest(folder), absent=absent_files(folder))


def checkpoint_digest(folder: Path) -> str:
    """Compute a digest of the config and every tensor's name, type, shape and place.

    Raises:
        K2Error: if the checkpoint is damaged.
    """
    from k2cli.models.checkpoint import read_checkpoint

    checkpoint = read_checkpoint(folder)
    # Not msgspec, which cannot encode the integers of any size that a config may have.
    digest = hashlib.sha256(json.dumps(checkpoint.config, sort_keys=True).encode())
    for name in sorted(checkpoint.tensors):
        tensor = checkpoint.tensors[name]
        place = (name, tensor.dtype, tensor.shape, tensor.file.name, tensor.offset, tensor.nbytes)
        digest.update(msgspec.json.encode(place))
    return digest.hexdigest()
