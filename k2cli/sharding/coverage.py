"""The proof that the ranks together hold the whole model, made of what they really loaded.

Each rank lists the tensors that it has evaluated. The lists are held against the whole model as
the checkpoint's headers describe it: every tensor must be on exactly the ranks that the placement
says, whole or as slices that add up. A pipeline that lost a layer, or a rank that loaded another
split than its peers, cannot pass.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import mlx.nn as nn

from k2cli.errors import ClusterError
from k2cli.sharding.placement import Placement
from k2cli.sharding.stage import anatomy
from k2cli.sharding.trace import parameters

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class _Names:
    """How the parameters of a model's parts are called."""

    layers: str
    embeddings: tuple[str, ...]
    tied_embedding: str | None


@dataclass(frozen=True, slots=True)
class WholeModel:
    """What the ranks have to hold together: made by ``describe_whole``."""

    shapes: Shapes
    names: _Names


def describe_whole(model: nn.Module) -> WholeModel:
    """Note what a model holds, before it is cut; lazily opened tensors will do.

    Args:
        model: the whole model, as the checkpoint's headers describe it.
    """
    shapes = {name: tuple(value.shape) for name, value in parameters(model).items()}
    return WholeModel(shapes, _names(model))


def _names(model: nn.Module) -> _Names:
    parts = anatomy(model)
    modules = [parent[name] for parent, name in parts.embeddings]
    paths = {
        f"{path}.": module
        for path, module in model.named_modules()
        if any(module is embedding for embedding in modules)
    }
    largest = max(paths, key=lambda path: int(paths[path].weight.size), default=None)
    return _Names(f"{parts.layers_path}.", tuple(paths), largest if parts.tied else None)


def _holders(name: str, placement: Placement, names: _Names) -> set[int]:
    """The ranks that the placement wants a tensor on."""
    if placement.strategy != "pipeline":
        return set(range(placement.size))
    if name.startswith(names.layers):
        index = int(name.removeprefix(names.layers).partition(".")[0])
        return {part.rank for part in placement.ranks if part.layers[0] <= index < part.layers[1]}
    if names.tied_embedding is not None and name.startswith(names.tied_embedding):
        return {placement.size - 1, 0}
    return {placement.size - 1} if name.startswith(names.embeddings) else {0}


def _adds_up(whole: tuple[int, ...], parts: Sequence[tuple[int, ...]]) -> bool:
    """Whether parts are the whole each, or equal slices of it along one axis."""
    if all(part == whole for part in parts):
        return True
    if len(set(parts)) != 1 or len(parts[0]) != len(whole):
        return False
    differing = [axis for axis in range(len(whole)) if parts[0][axis] != whole[axis]]
    return len(differing) == 1 and parts[0][differing[0]] * len(parts) == whole[differing[0]]


def check_coverage(whole_model: WholeModel, placement: Placement, held: Sequence[Shapes]) -> int:
    """Prove that the ranks hold the model as placed.

    Args:
        whole_model: what there is to hold.
        held: per rank, the shapes of the tensors that it has loaded.

    Returns:
        The number of tensors proven.

    Raises:
        ClusterError: naming tensors that are missing, misplaced, misshapen or unknown.
    """
    whole, names = whole_model.shapes, whole_model.names
    problems: list[str] = []
    for name, shape in whole.items():
        wanted = _holders(name, placement, names)
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
