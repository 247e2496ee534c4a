"""Checkpoints on this machine: headers to plan from, and a digest to compare."""

from __future__ import annotations

import hashlib
from pathlib import Path

import msgspec

from k2cli.errors import K2Error

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
    """A node's checkpoint: its folder and the digest of config and headers, or the problem."""

    folder: str = ""
    digest: str = ""
    problem: str = ""


def checkpoint_heads(reference: str) -> CheckpointHeads:
    """Read the config and the headers of a model on this machine."""
    from k2cli.models.checkpoint import read_checkpoint
    from k2cli.models.reference import local_checkpoint

    try:
        folder = local_checkpoint(reference).resolve()
        checkpoint = read_checkpoint(folder)
    except K2Error as error:
        return CheckpointHeads(problem=error.message)
    whole = [folder / name for name in _COPIED_WHOLE if (folder / name).is_file()]
    heads = [FileHead(path.name, path.stat().st_size, path.read_bytes()) for path in whole]
    for path in sorted({tensor.file for tensor in checkpoint.tensors.values()}):
        with path.open("rb") as file:
            # The first eight bytes are the header's length; read_checkpoint has checked it.
            length = int.from_bytes(file.read(8), "little")
            file.seek(0)
            heads.append(FileHead(path.name, path.stat().st_size, file.read(8 + length)))
    return CheckpointHeads(str(folder), tuple(heads))


def find_checkpoint(reference: str, folder: str) -> ModelCopy:
    """Find a model in this machine's own store, or else in the folder that the launcher has it in.

    A reference that is a path is tried after the folder.
    """
    from k2cli.models.reference import local_checkpoint

    problem = ""
    is_path = reference.startswith("/")
    for text in dict.fromkeys((folder, reference) if is_path else (reference, folder)):
        try:
            found = local_checkpoint(text).resolve()
            return ModelCopy(str(found), checkpoint_digest(found))
        except K2Error as error:
            # Report the problem with the reference, which the user knows, unlike the folder.
            if text == reference or not problem:
                problem = error.message
    return ModelCopy(problem=problem)


def checkpoint_digest(folder: Path) -> str:
    """Compute a digest of the config and every tensor's name, type, shape and place.

    Raises:
        K2Error: if the checkpoint is damaged.
    """
    from k2cli.models.checkpoint import read_checkpoint

    checkpoint = read_checkpoint(folder)
    digest = hashlib.sha256(msgspec.json.encode(checkpoint.config, order="deterministic"))
    for name in sorted(checkpoint.tensors):
        tensor = checkpoint.tensors[name]
        place = (name, tensor.dtype, tensor.shape, tensor.file.name, tensor.offset, tensor.nbytes)
        digest.update(msgspec.json.encode(place))
    return digest.hexdigest()
