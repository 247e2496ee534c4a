"""Where a node has the model of a launch, and whether it is the same one: asked of its agent.

The folder may lie elsewhere on every machine. Two checkpoints are taken for the same if config and
all safetensors headers are: names, types, shapes and places of every tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from k2cli.agent.model import ModelThere, checkpoint_digest
from k2cli.errors import ClusterError
from k2cli.launch.model_source import ModelHere
from k2cli.models.reference import is_path
from k2cli.nodes.node import Node

_NODES_AT_ONCE = 8


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
