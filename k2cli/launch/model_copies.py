"""Find the folder of the model on each node, and check that all nodes have the same checkpoint.

The folder may be another one on every machine. Two checkpoints count as the same if their configs
and all safetensors headers are equal: name, type, shape and position of every tensor. A node may
have a part of the checkpoint, with the headers of the rest, if the files that its ranks read are
there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from k2cli.agent.model import ModelCopy, checkpoint_digest, model_copy
from k2cli.errors import ClusterError
from k2cli.launch.model_source import ModelSource
from k2cli.models.checkpoint import read_checkpoint
from k2cli.nodes.node import LOCALHOST, Node
from k2cli.nodes.parallel import map_in_parallel
from k2cli.sharding.placement import Placement
from k2cli.transfer.parts import files_of_nodes
from k2cli.units import format_bytes


@dataclass(frozen=True, slots=True)
class Lacking:
    """The weight files that one node lacks for its ranks, with their bytes, and why."""

    node: str
    files: frozenset[str]
    nbytes: int
    of_bytes: int
    problem: str = ""


@dataclass(frozen=True, slots=True)
class Copies:
    """The folder of the model on each node that has what it needs, and what the others lack.

    ``wanted`` are the files that the ranks of each node read, known if a node lacks something.
    """

    folders: Mapping[str, str]
    lacking: tuple[Lacking, ...] = ()
    wanted: Mapping[str, frozenset[str]] | None = None


def find_model_copies(
    nodes: Sequence[Node], reference: str, source: ModelSource, placement: Placement | None = None
) -> dict[str, str]:
    """Return each node's folder of the model, by name; all of them hold the same checkpoint.

    Args:
        nodes: those of the ranks.
        reference: the model as the user named it, but with an absolute path.
        source: the checkpoint that the plan was made from.
        placement: the placement of the ranks; without it every node needs the whole model.

    Raises:
        ClusterError: if a node lacks weights that it needs, or has another checkpoint. The hint is
            how to bring them there.
    """
    copies = examine_copies(nodes, reference, source, placement)
    if copies.lacking:
        raise lacking_error(copies, reference, source)
    return dict(copies.folders)


def examine_copies(
    nodes: Sequence[Node], reference: str, source: ModelSource, placement: Placement | None
) -> Copies:
    """Ask each node for its copy, and find what it lacks.

    Raises:
        ClusterError: if a node has another checkpoint.
    """
    known = {node.name: node for node in nodes}
    own_digest = checkpoint_digest(source.folder)
    answers = map_in_parallel(lambda node: _ask(node, reference, source), list(known.values()))
    found = dict(zip(known, answers, strict=True))
    for name, copy in found.items():
        if not copy.problem and copy.digest != own_digest:
            raise _other_checkpoint(name, copy, found, reference, source)
    folders = {name: copy.folder for name, copy in found.items() if not copy.problem}
    if not any(copy.problem or copy.absent for copy in found.values()):
        return Copies(folders)
    checkpoint = read_checkpoint(source.folder)
    sizes: dict[str, int] = {}
    for tensor in checkpoint.tensors.values():
        sizes[tensor.file.name] = sizes.get(tensor.file.name, 0) + tensor.nbytes
    wanted: Mapping[str, frozenset[str]] = dict.fromkeys(known, frozenset(sizes))
    if placement is not None:
        wanted = files_of_nodes(checkpoint, placement, [node.name for node in nodes])
    lacking = [
        Lacking(
            name,
            files,
            sum(sizes[file] for file in files),
            sum(sizes[file] for file in wanted[name]),
            copy.problem,
        )
        for name, copy in found.items()
        if (files := wanted[name] if copy.problem else wanted[name] & copy.absent.keys())
    ]
    return Copies(folders, tuple(lacking), wanted)


def _ask(node: Node, reference: str, source: ModelSource) -> ModelCopy:
    if source.source_node is not None:
        # The folder here holds headers without weights, so no rank may load it.
        return node.ask(ModelCopy, "checkpoint", reference, reference)
    if node.is_local:
        return model_copy(source.folder)
    return node.ask(ModelCopy, "checkpoint", reference, str(source.folder))


def _other_checkpoint(
    name: str,
    copy: ModelCopy,
    found: Mapping[str, ModelCopy],
    reference: str,
    source: ModelSource,
) -> ClusterError:
    origin = f"this machine in {source.folder}"
    if source.source_node is not None and found[source.source_node].folder:
        origin = f"node {source.source_node} in {found[source.source_node].folder}"
    return ClusterError(
        f"node {name} has another {reference} in {copy.folder} than {origin}: "
        "config or tensors differ",
        f"{push_command([name], reference, source)} --replace",
    )


def lacking_error(copies: Copies, reference: str, source: ModelSource) -> ClusterError:
    """Return the error for nodes that lack weights: which, how many bytes, and what brings them."""
    texts = [_lack_text(each) for each in copies.lacking]
    names = [each.node for each in copies.lacking]
    command = push_command(names, reference, source)
    return ClusterError(
        f"weights of {reference} are missing: {'; '.join(texts)}",
        f"{command}, or only what the ranks read: --fetch",
    )


def _lack_text(lacking: Lacking) -> str:
    text = f"node {lacking.node} lacks {format_bytes(lacking.nbytes)}"
    if lacking.nbytes != lacking.of_bytes:
        text += f" of the {format_bytes(lacking.of_bytes)} that it needs"
    return f"{text} ({lacking.problem})" if lacking.problem else text


def push_command(names: Sequence[str], reference: str, source: ModelSource) -> str:
    """Return the command that brings the whole model to nodes."""
    sender = f" --from {source.source_node}" if source.source_node is not None else ""
    if not sender and LOCALHOST in names:
        sender = " --from NODE, where NODE has the whole model"
    return f"k2 models push {reference} {' '.join(names)}{sender}"
