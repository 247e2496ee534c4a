"""Find the folder that a launch plans from: the model on this machine, or headers sent by a node.

If this machine does not have the model, the first node sends config, index and the header of each
safetensors file. Sparse files of the same sizes, which hold only the headers, stand for the
checkpoint here until the launch is prepared.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from k2cli.agent.model import ModelCopy
from k2cli.errors import K2Error, UsageError
from k2cli.models.reference import local_checkpoint
from k2cli.models.text.present import check_text_files
from k2cli.nodes.node import Node
from k2cli.transfer.headers import fetch_headers


@dataclass(frozen=True, slots=True)
class ModelSource:
    """The folder to plan from. ``source_node`` sent its headers; None if the model is here."""

    folder: Path
    source_node: str | None = None


@contextmanager
def locate_model(
    reference: str, nodes: Sequence[Node], *, fetch: bool = False
) -> Iterator[ModelSource]:
    """Find the model to plan from. The folder exists at least as long as the context.

    Args:
        reference: the model as the user named it.
        nodes: those of the ranks. If one is this machine, the model must be here.
        fetch: True if the model will be brought to the nodes that lack it, this one too.

    Raises:
        UsageError: if the reference is invalid.
        K2Error: if the model is neither here nor on the first node.
    """
    try:
        own = local_checkpoint(reference, part=True).resolve()
    except K2Error as error:
        # A node cannot resolve an invalid reference or a relative path either.
        elsewhere = reference.startswith(("/", "~")) or error.exit_code == K2Error.exit_code
        holder = _first_holder(nodes, reference) if fetch and elsewhere else nodes[0]
        if holder is None or holder.is_local or not elsewhere:
            raise
        if any(node.is_local for node in nodes) and not fetch:
            raise
    else:
        _check_encoding(own)
        if nodes[0].is_local:  # the leader, whose guard reads texts
            check_text_files(own)
        yield ModelSource(own)
        return
    with tempfile.TemporaryDirectory(prefix="k2-heads-") as base:
        yield ModelSource(fetch_headers(reference, holder, Path(base)), holder.name)


def _first_holder(nodes: Sequence[Node], reference: str) -> Node | None:
    """Return the first other machine that has the model; None if none has it."""
    for node in {node.name: node for node in nodes if not node.is_local}.values():
        found: ModelCopy = node.ask(ModelCopy, "checkpoint", reference, reference)
        if not found.problem:
            return node
    return None


def _check_encoding(folder: Path) -> None:
    """Refuse a folder whose name the messages between k2's processes cannot carry."""
    try:
        str(folder).encode()
    except UnicodeEncodeError:
        raise UsageError(
            f"the name of the folder '{folder}' is not valid UTF-8", "rename it, or make a link"
        ) from None
