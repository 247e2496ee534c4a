"""The model of a launch as this machine has it: headers to plan from, and a digest to compare."""

from __future__ import annotations

import hashlib
from pathlib import Path

import msgspec

from k2cli.errors import K2Error

_COPIED_WHOLE = ("config.json", "generation_config.json", "model.safetensors.index.json")


class FileHead(msgspec.Struct, frozen=True):
    """A file's name, its size in bytes, and as much of its start as planning reads."""

    name: str
    size: int
    head: bytes


class CheckpointHeads(msgspec.Struct, frozen=True):
    """A node's checkpoint without data: its folder there and its files, or what is wrong."""

    folder: str = ""
    files: tuple[FileHead, ...] = ()
    problem: str = ""


def checkpoint_heads(reference: str) -> CheckpointHeads:
    """On a node: the headers of the model of that reference."""
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
            # The header's length stands first, in eight bytes; it was checked above.
            length = int.from_bytes(file.read(8), "little")
            file.seek(0)
            heads.append(FileHead(path.name, path.stat().st_size, file.read(8 + length)))
    return CheckpointHeads(str(folder), tuple(heads))


class ModelThere(msgspec.Struct, frozen=True):
    """A node's checkpoint: its folder and the digest of config and headers, or what is wrong."""

    folder: str = ""
    digest: str = ""
    problem: str = ""


def find_checkpoint(reference: str, folder: str) -> ModelThere:
    """On a node: the model of that reference in its own store, else the folder of the launcher."""
    from k2cli.models.reference import local_checkpoint

    problem = ""
    for text in (
        dict.fromkeys((folder, reference))
        if reference.startswith("/")
        else (
            reference,
            folder,
        )
    ):
        try:
            found = local_checkpoint(text).resolve()
            return ModelThere(str(found), checkpoint_digest(found))
        except K2Error as error:
            # The folder is the launcher's; of the two it is the reference that the user knows.
            if text == reference or not problem:
                problem = error.message
    return ModelThere(problem=problem)


def checkpoint_digest(folder: Path) -> str:
    """Of the config and every tensor's name, type, shape and place.

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
