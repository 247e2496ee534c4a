"""Find the folder of the model on each node, and check that all nodes have the same checkpoint.

The folder may be another one on every machine. Two checkpoints count as the same if their configs
and all safetensors headers are equal: name, type, shape and position of every tensor.
"""

from __future__ import annotations

from collections.abc import Sequence

from k2cli.agent.model import ModelCopy, checkpoint_digest
from k2cli.errors import ClusterError
from k2cli.launch.model_source import ModelSource
from k2cli.models.reference import is_path
from k2cli.nodes.node import Node
from k2cli.nodes.parallel import map_in_parallel


def find_model_copies(nodes: Sequence[Node], reference: str, source: ModelSource) -> dict[str, str]:
    """Return each node's folder of the model, by name; all of them hold the same checkpoint.

    Args:
        nodes: those of the ranks.
        reference: the model as the user named it, but with an absolute path.
        source: the checkpoint that the plan was made from.

    Raises:
        ClusterError: if a node lacks the model or has another one. The hint is how to copy it.
    """
    known = {node.name: node for node in nodes}
    own_digest = checkpoint_digest(source.folder)
    copies = map_in_parallel(lambda node: _ask(node, reference, source), list(known.values()))
    found = dict(zip(known, copies, strict=True))
    origin, origin_folder = f"this machine in {source.folder}", ""
    if source.source_node is not None and found[source.source_node].folder:
        origin_folder = found[source.source_node].folder
        origin = f"node {source.source_node} in {origin_folder}"
    for name, copy in found.items():
        if copy.problem:
            problem = f"node {name} cannot load {reference}: {copy.problem}"
        elif copy.digest != own_digest:
            problem = (
                f"node {name} has another {reference} in {copy.folder} than {origin}: "
                "config or tensors differ"
            )
        else:
            continue
        raise ClusterError(problem, _copy_command(name, reference, source, origin_folder))
    return {name: copy.folder for name, copy in found.items()}


def _ask(node: Node, reference: str, source: ModelSource) -> ModelCopy:
    if source.source_node is not None:
        # The folder here holds headers without weights, so no rank may load it.
        return node.ask(ModelCopy, "checkpoint", reference, reference)
    if node.is_local:
        return ModelCopy(str(source.folder), checkpoint_digest(source.folder))
    return node.ask(ModelCopy, "checkpoint", reference, str(source.folder))


def _copy_command(name: str, reference: str, source: ModelSource, origin_folder: str) -> str:
    if is_path(reference) and source.source_node is not None:
        return f"ssh {source.source_node} rsync -a {origin_folder}/ {name}:{origin_folder}/"
    if reference.startswith("/"):
        return f"rsync -a {source.folder}/ {name}:{source.folder}/"
    return f"ssh {name} k2 download {reference}"
