"""What a launch plans from: the model on this machine, or the headers that a node has of it.

Who launches from a laptop has no weights there. The first node then sends config, index and the
start of each safetensors file; files of the same sizes, all holes but for that, stand for its
checkpoint here until the launch is prepared.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import msgspec

from k2cli.errors import ClusterError, K2Error
from k2cli.nodes.node import Node

_WHOLE = ("config.json", "generation_config.json", "model.safetensors.index.json")


@dataclass(frozen=True, slots=True)
class ModelHere:
    """The folder to plan from; ``lender`` is the node whose headers it holds, None for our own."""

    folder: Path
    lender: str | None = None


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


def is_path(reference: str) -> bool:
    """Whether a model is meant by its folder or file, here or, if it is not here, on a node."""
    from k2cli.models.reference import parse_reference

    return reference.startswith(("/", "~")) or parse_reference(reference).path is not None


def checkpoint_heads(reference: str) -> CheckpointHeads:
    """On a node: the headers of the model of that reference."""
    from k2cli.models.checkpoint import read_checkpoint
    from k2cli.models.reference import local_checkpoint

    try:
        folder = local_checkpoint(reference).resolve()
        checkpoint = read_checkpoint(folder)
    except K2Error as error:
        return CheckpointHeads(problem=error.message)
    whole = [folder / name for name in _WHOLE if (folder / name).is_file()]
    heads = [FileHead(path.name, path.stat().st_size, path.read_bytes()) for path in whole]
    for path in sorted({tensor.file for tensor in checkpoint.tensors.values()}):
        with path.open("rb") as file:
            # The header's length stands first, in eight bytes; it was checked above.
            length = int.from_bytes(file.read(8), "little")
            file.seek(0)
            heads.append(FileHead(path.name, path.stat().st_size, file.read(8 + length)))
    return CheckpointHeads(str(folder), tuple(heads))


@contextmanager
def model_here(reference: str, nodes: Sequence[Node]) -> Iterator[ModelHere]:
    """The model to plan from, for as long as the context lasts.

    Args:
        reference: what the user called it.
        nodes: of the ranks. If one is this machine, the model must be here.

    Raises:
        UsageError: if the reference makes no sense.
        K2Error: if the model is neither here nor on the first node.
    """
    from k2cli.models.reference import local_checkpoint

    try:
        own = local_checkpoint(reference).resolve()
    except K2Error as error:
        # Of a word that is no reference, or of a relative path, a node knows no more.
        elsewhere = reference.startswith(("/", "~")) or error.exit_code == K2Error.exit_code
        if any(node.is_local for node in nodes) or not elsewhere:
            raise
    else:
        yield ModelHere(own)
        return
    with tempfile.TemporaryDirectory(prefix="k2-heads-") as base:
        yield ModelHere(_borrow(reference, nodes[0], Path(base)), nodes[0].name)


def _borrow(reference: str, node: Node, base: Path) -> Path:
    heads: CheckpointHeads = node.ask(CheckpointHeads, "checkpoint-heads", reference)
    if heads.problem:
        hint = f"ssh {node.name} k2 download {reference}"
        if is_path(reference):
            hint = f"give the folder as node {node.name} has it"
        raise ClusterError(
            f"{reference} is not on this machine, and node {node.name} says: {heads.problem}", hint
        )
    # Named alike, since clients see that name.
    folder = base / Path(heads.folder).name
    try:
        folder.mkdir()
        for file in heads.files:
            if Path(file.name).name != file.name:
                raise ClusterError(f"node {node.name} sent a file named '{file.name}'")
            path = folder / file.name
            path.write_bytes(file.head)
            os.truncate(path, file.size)
    except OSError as error:
        raise ClusterError(f"headers cannot be written to {folder}: {error.strerror}") from error
    return folder
