"""Loads a rank's part of a checkpoint: lazily opened, cut, then evaluated tensor by tensor.

Only the tensors of the rank's own part are ever read. Each is evaluated by itself, so that the
memory in use never exceeds what is loaded plus one tensor and what it is made from.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from k2cli.errors import K2Error
from k2cli.models.checkpoint import Checkpoint, read_checkpoint
from k2cli.runtime.protocol import Assignment, HeldTensor
from k2cli.sharding.assemble import assemble
from k2cli.sharding.placement import Placement, RankPlacement
from k2cli.sharding.stage import Stage
from k2cli.sharding.tensor import StandInGroup
from k2cli.sharding.trace import cut, parameters, trace_model


@dataclass(frozen=True, slots=True)
class LoadedPart:
    """A rank's part, evaluated, and the list of what it holds."""

    stage: Stage
    held: list[HeldTensor]
    weights_bytes: int


def placement_of(assignment: Assignment) -> Placement:
    """The placement that an assignment carries out."""
    ranks = zip(assignment.nodes, assignment.layers, strict=True)
    return Placement(
        assignment.strategy,
        tuple(RankPlacement(rank, node, layers) for rank, (node, layers) in enumerate(ranks)),
        assignment.head,
    )


def trace_whole(assignment: Assignment) -> nn.Module:
    """The whole model as the checkpoint's headers describe it, lazily: what coverage is held to."""
    checkpoint = read_checkpoint(Path(assignment.model_path))
    stored = {name: (t.dtype, t.shape) for name, t in checkpoint.tensors.items()}
    return trace_model(checkpoint.config, stored, assignment.dtype)


def _open_tensors(checkpoint: Checkpoint) -> dict[str, mx.array]:
    """Every stored tensor, lazily: the files are opened, their headers read, nothing more."""
    if not checkpoint.tensors:
        raise K2Error(f"{checkpoint.folder} holds no safetensors files")
    tensors: dict[str, mx.array] = {}
    for file in sorted({tensor.file for tensor in checkpoint.tensors.values()}):
        opened = mx.load(str(file))
        assert isinstance(opened, dict)
        tensors.update(opened)
    return {name: tensors[name] for name in checkpoint.tensors}


def load_part(
    assignment: Assignment, group: Any | None, on_bytes: Callable[[int, int], None]
) -> LoadedPart:
    """Load the part of ``assignment.rank``.

    Args:
        group: the MLX group; None for a single rank.
        on_bytes: called after each tensor with (bytes done, bytes in all).

    Raises:
        K2Error: if the checkpoint cannot be read, or is not the one planned for.
    """
    checkpoint = read_checkpoint(Path(assignment.model_path))
    model = assemble(checkpoint.config, _open_tensors(checkpoint), assignment.dtype)
    group = group or StandInGroup(0, 1)
    stage = cut(checkpoint.config, model, placement_of(assignment), group)
    total = sum(value.nbytes for value in parameters(model).values())
    expected = assignment.expected_weights_bytes[assignment.rank]
    if total != expected:
        raise K2Error(
            f"{checkpoint.folder} makes {total} bytes for rank {assignment.rank}, "
            f"the plan says {expected}",
            "plan again: k2 plan-memory MODEL",
        )
    _evaluate(model, total, on_bytes)
    held = [
        HeldTensor(name, list(value.shape), str(value.dtype), value.nbytes)
        for name, value in parameters(model).items()
    ]
    return LoadedPart(stage, held, total)


def _evaluate(model: nn.Module, total: int, on_bytes: Callable[[int, int], None]) -> None:
    """Read and compute the parameters, one by one, into arrays that own no more than themselves."""
    done = 0
    for name, value in tree_flatten(model.parameters()):
        # A slice may be a view that keeps its whole source alive: make it an array of its own.
        owned = mx.contiguous(value)
        mx.eval(owned)
        _replace(model, name, owned)
        done += owned.nbytes
        on_bytes(done, total)


def _replace(model: nn.Module, name: str, value: mx.array) -> None:
    """Put one parameter back by its dotted name."""
    *path, last = name.split(".")
    owner: Any = model
    for step in path:
        owner = owner[int(step)] if isinstance(owner, list | tuple) else owner[step]
    owner[int(last) if isinstance(owner, list) else last] = value
