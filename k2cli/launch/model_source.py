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

from k2cli.agent.model import CheckpointHeads
from k2cli.errors import ClusterError, K2Error
from k2cli.models.reference import is_path
from k2cli.nodes.node import Node


@dataclass(frozen=True, slots=True)
class ModelHere:
    """The folder to plan from; ``lender`` is the node whose headers it holds, None for our own."""

    folder: Path
    lender: str | None = None


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
