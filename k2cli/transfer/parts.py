"""The weight files that each node of a placement reads, and the files that it is offered."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from k2cli.agent.weights.messages import ModelFiles, WeightsFile
from k2cli.models.checkpoint import Checkpoint
from k2cli.models.part import FOLDER
from k2cli.sharding.placement import Placement


def files_of_nodes(
    checkpoint: Checkpoint, placement: Placement, nodes: Sequence[str]
) -> dict[str, frozenset[str]]:
    """Return the names of the weight files that the ranks of each node read.

    Args:
        checkpoint: the model, whole or a part, with the headers of all files.
        placement: the placement of its ranks.
        nodes: the node of each rank.

    Raises:
        K2Error: if the config and the tensors make no model.
    """
    from k2cli.sharding.coverage import stored_holders

    stored = {name: (tensor.dtype, tensor.shape) for name, tensor in checkpoint.tensors.items()}
    ranks_of = stored_holders(checkpoint.config, stored, placement)
    files: dict[str, set[str]] = {node: set() for node in nodes}
    for name, tensor in checkpoint.tensors.items():
        for rank in ranks_of(name):
            files[nodes[rank]].add(tensor.file.name)
    return {node: frozenset(names) for node, names in files.items()}


@dataclass(frozen=True, slots=True)
class Share:
    """The share of one node: files to send, and the sizes of weight files that it does not get.

    ``sources`` maps a file to the source's file whose beginning it is, for headers.
    """

    files: tuple[WeightsFile, ...]
    absent: Mapping[str, int]
    sources: Mapping[str, str]


def share_of(found: ModelFiles, wanted: frozenset[str] | None) -> Share:
    """Return the share of a node that reads these weight files; None stands for all of them."""
    sizes = {f.name: f.nbytes for f in found.files if f.name.endswith(".safetensors")}
    sizes |= found.absent
    absent = {} if wanted is None else {n: s for n, s in sizes.items() if n not in wanted}
    files = [file for file in found.files if file.name not in absent]
    modified = {file.name: file.modified_ns for file in found.files}
    sources: dict[str, str] = {}
    for name in sorted(absent):
        copy = f"{FOLDER}/{name}"
        files.append(WeightsFile(copy, found.header_bytes[name], "", modified.get(name, 1)))
        sources[copy] = copy if name in found.absent else name
    return Share(tuple(files), absent, sources)


def lacking(found: ModelFiles, wanted: frozenset[str] | None) -> list[str]:
    """Return the weight files that are wanted and that the source itself lacks."""
    return sorted(name for name in found.absent if wanted is None or name in wanted)
