"""Proof that the ranks together hold the whole model, from the tensors that they have loaded.

Each rank lists the tensors that it has evaluated. The lists are compared with the whole model as
the checkpoint's headers describe it: every tensor must be on exactly the ranks of the placement,
whole or as slices that add up. A pipeline without one layer, or a rank that loaded another split
than its peers, does not pass. The same placement says which ranks read a stored tensor.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.nn as nn

from k2cli.errors import ClusterError
from k2cli.sharding.placement import Placement
from k2cli.sharding.stage import anatomy
from k2cli.sharding.trace import StoredShapes, parameters, trace_model

Shapes = Mapping[str, tuple[int, ...]]
Holders = Callable[[str], frozenset[int]]


@dataclass(frozen=True, slots=True)
class PartNames:
    """Prefixes of the names of the parameters in a model's parts."""

    layers: str
    embeddings: tuple[str, ...]
    tied_embedding: str | None


@dataclass(frozen=True, slots=True)
class WholeModel:
    """Tensors that the ranks must hold together; ``describe_whole`` makes it."""

    shapes: Shapes
    names: PartNames


def describe_whole(model: nn.Module) -> WholeModel:
    """Describe the tensors of a whole model, which may be lazy, before it is cut."""
    shapes = {name: tuple(value.shape) for name, value in parameters(model).items()}
    return WholeModel(shapes, _names(model))


def _names(model: nn.Module) -> PartNames:
    parts = anatomy(model)
    modules = [parent[name] for parent, name in parts.embeddings]
    paths = {
        f"{path}.": module
        for path, module in model.named_modules()
        if any(module is embedding for embedding in modules)
    }
    largest = max(paths, key=lambda path: int(paths[path].weight.size), default=None)
    return PartNames(f"{parts.layers_path}.", tuple(paths), largest if parts.tied else None)


def holders(name: str, placement: Placement, names: PartNames) -> set[int]:
    """Return the ranks that must hold a tensor by the placement."""
    if placement.strategy != "pipeline":
        return set(range(placement.size))
    if name.startswith(names.layers):
        index = int(name.removeprefix(names.layers).partition(".")[0])
        return {part.rank for part in placement.ranks if part.layers[0] <= index < part.layers[1]}
    if names.tied_embedding is not None and name.startswith(names.tied_embedding):
        return {placement.size - 1, 0}
    return {placement.size - 1} if name.startswith(names.embeddings) else {0}


def _adds_up(whole: tuple[int, ...], parts: Sequence[tuple[int, ...]]) -> bool:
    """True if each part is the whole, or the parts are equal slices of it along one axis."""
    if all(part == whole for part in parts):
        return True
    if len(set(parts)) != 1 or len(parts[0]) != len(whole):
        return False
    differing = [axis for axis in range(len(whole)) if parts[0][axis] != whole[axis]]
    return len(differing) == 1 and parts[0][differing[0]] * len(parts) == whole[differing[0]]


def check_coverage(whole_model: WholeModel, placement: Placement, held: Sequence[Shapes]) -> int:
    """Prove that the ranks hold the model as placed.

    Args:
        whole_model: the tensors of the whole model.
        held: the shapes of the tensors that each rank has loaded.

    Returns:
        The number of tensors.

    Raises:
        ClusterError: if tensors are missing, misplaced, of another shape or unknown; it names some.
    """
    whole, names = whole_model.shapes, whole_model.names
    problems: list[str] = []
    for name, shape in whole.items():
        wanted = holders(name, placement, names)
        actual = {rank for rank, tensors in enumerate(held) if name in tensors}
        if wanted != actual:
            problems.append(f"{name} is held by ranks {sorted(actual)}, placed on {sorted(wanted)}")
            continue
        parts = [tuple(held[rank][name]) for rank in sorted(actual)]
        whole_each = placement.strategy != "tensor"
        if (whole_each and any(p != shape for p in parts)) or not _adds_up(shape, parts):
            problems.append(f"{name} is {list(shape)}, the ranks hold {[list(p) for p in parts]}")
    for rank, tensors in enumerate(held):
        problems += [f"rank {rank} holds unknown {name}" for name in tensors.keys() - whole.keys()]
    if problems:
        more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
        raise ClusterError(
            "the ranks do not hold the model as placed: " + "; ".join(problems[:3]) + more,
            "check that every node has the same checkpoint and the same k2",
        )
    return len(whole)


def stored_holders(
    config: Mapping[str, Any], stored: StoredShapes, placement: Placement
) -> Holders:
    """Return a function from a stored tensor's name to the ranks that read it.

    With it a machine gets the files of its own ranks alone. Every rank of another placement than a
    pipeline reads all tensors, whole or in part.

    Stored names mostly are those of parameters. Of others, which a model's class joins or renames,
    the layer is known by the number in the name. A rank that needs a tensor of a file which it does
    not have refuses to load (``rank.absent_files``), so that a wrong guess here cannot give wrong
    answers.

    Raises:
        K2Error: if the config and the tensors make no model.
    """
    everybody = frozenset(range(placement.size))
    if placement.strategy != "pipeline":
        return lambda name: everybody
    whole = describe_whole(trace_model(config, stored))
    layers = whole.names.layers.rstrip(".").rpartition(".")[2]
    numbered = re.compile(rf"(?:^|\.){re.escape(layers)}\.(\d+)\.")
    ends = frozenset({0, placement.size - 1})

    def find(name: str) -> frozenset[int]:
        if name in whole.shapes:
            return frozenset(holders(name, placement, whole.names))
        if (match := numbered.search(name)) is None:
            return ends
        layer = int(match[1])
        # A number past the last layer is that of a layer for predicting more tokens, which mlx-lm
        # leaves out.
        return frozenset(p.rank for p in placement.ranks if p.layers[0] <= layer < p.layers[1])

    return find
