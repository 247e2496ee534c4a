"""Where a node has the model of a launch, and whether it is the same one: asked of its agent.

The folder may lie elsewhere on every machine. Two checkpoints are taken for the same if config and
all safetensors headers are: names, types, shapes and places of every tensor.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec

from k2cli.errors import ClusterError, K2Error
from k2cli.launch.model_source import ModelHere, is_path
from k2cli.nodes.node import Node

_NODES_AT_ONCE = 8


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


def model_folders(nodes: Sequence[Node], reference: str, here: ModelHere) -> dict[str, str]:
    """Each node's folder of the model, by name; all of them hold the same checkpoint.

    Args:
        nodes: of the ranks.
        reference: what the user called the model; a path is given as it is seen from everywhere.
        here: the checkpoint that the plan was made from.

    Raises:
        ClusterError: naming the node that lacks it or has another one, and the command that helps.
    """
    known = {node.name: node for node in nodes}
    folder = here.folder
    own = checkpoint_digest(folder)
    with ThreadPoolExecutor(_NODES_AT_ONCE) as pool:
        found = dict(
            zip(
                known,
                pool.map(lambda node: _ask(node, reference, here), known.values()),
                strict=True,
            )
        )
    lender = found[here.lender].folder if here.lender is not None else ""
    source = f"node {here.lender} in {lender}" if lender else f"this machine in {folder}"
    for name, there in found.items():
        if there.problem:
            raise ClusterError(
                f"node {name} cannot load {reference}: {there.problem}",
                _command(name, reference, here, lender),
            )
        if there.digest != own:
            raise ClusterError(
                f"node {name} has another {reference} in {there.folder} than {source}: "
                "config or tensors differ",
                _command(name, reference, here, lender),
            )
    return {name: there.folder for name, there in found.items()}


def _ask(node: Node, reference: str, here: ModelHere) -> ModelThere:
    if here.lender is not None:
        # No rank may ever load the stand-in, which holds no weights.
        return node.ask(ModelThere, "checkpoint", reference, reference)
    if node.is_local:
        return ModelThere(str(here.folder), checkpoint_digest(here.folder))
    return node.ask(ModelThere, "checkpoint", reference, str(here.folder))


def _command(name: str, reference: str, here: ModelHere, lender: str) -> str:
    folder = here.folder
    if is_path(reference) and here.lender is not None:
        return f"ssh {here.lender} rsync -a {lender}/ {name}:{lender}/"
    if reference.startswith("/"):
        return f"rsync -a {folder}/ {name}:{folder}/"
    return f"ssh {name} k2 download {reference}"
