"""A checkpoint that only a node has, as a folder of its headers here, to plan and to divide it."""

from __future__ import annotations

import os
from pathlib import Path

from k2cli.agent.model import CheckpointHeads
from k2cli.errors import ClusterError
from k2cli.models.reference import is_path
from k2cli.nodes.node import Node


def fetch_headers(reference: str, node: Node, base: Path) -> Path:
    """Fetch config, index and headers of a node's checkpoint into a folder below ``base``.

    Sparse files of the same sizes, which hold only the headers, stand for the weight files.

    Raises:
        ClusterError: if the node does not have the model, or sends something else.
    """
    heads: CheckpointHeads = node.ask(CheckpointHeads, "checkpoint-heads", reference)
    if heads.problem:
        hint = f"ssh {node.name} k2 download {reference}"
        if is_path(reference):
            hint = f"give the folder as node {node.name} has it"
        raise ClusterError(
            f"{reference} is not on this machine, and node {node.name} says: {heads.problem}", hint
        )
    # Clients see the folder's name, so it keeps that name here.
    folder = base / Path(heads.folder).name
    try:
        folder.mkdir()
        for file in heads.files:
            if Path(file.name).name != file.name or file.name in ("", ".."):
                raise ClusterError(f"node {node.name} sent a file named '{file.name}'")
            path = folder / file.name
            path.write_bytes(file.head)
            os.truncate(path, file.size)
    except (OSError, ValueError, OverflowError) as error:  # a zero byte, a size of 2^63
        raise ClusterError(f"headers of node {node.name} cannot be written: {error}") from error
    return folder
