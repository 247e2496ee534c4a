"""Loads a rank's part of a checkpoint: lazily opened, cut, then read tensor by tensor.

A parameter that is a slice of a stored tensor, or a large one whole, is read by ranges of its file
into memory of its own. One that is made of stored tensors in another way (experts stacked, fp8
expanded) is evaluated by mlx, which then reads those tensors whole. Either way one parameter at a
time, so that the memory in use never exceeds what is loaded, plus one parameter and what it is made
from.
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
from k2cli.models.checkpoint import DTYPE_BITS, Checkpoint, StoredTensor, read_checkpoint
from k2cli.protocol import Assignment, HeldTensor
from k2cli.rank.tensor_reader import TensorReader, suits
from k2cli.sharding.assemble import FLOAT_TYPES, assemble, cast
from k2cli.sharding.coverage import WholeModel, describe_whole
from k2cli.sharding.footprint import kv_cache_bytes
from k2cli.sharding.placement import Placement, RankPlacement
from k2cli.sharding.slices import AxisSlice, part_slices
from k2cli.sharding.stage import Stage
from k2cli.sharding.tensor import StandInGroup
from k2cli.sharding.trace import cut, parameters, running_model, trace_model


@dataclass(frozen=True, slots=True)
class LoadedPart:
    """A rank's part, evaluated, and the list of what it holds; ``whole`` is what all hold together.

    ``bytes_read`` is what was asked of the files, beside their headers; ``bytes_over_read`` is how
    much of it is in no parameter (``tensor_reader`` says why). For parameters that mlx evaluates,
    the whole of what the slice is cut from counts as read.
    """

    stage: Stage
    whole: WholeModel
    held: list[HeldTensor]
    weights_bytes: int
    bytes_read: int = 0
    bytes_over_read: int = 0


@dataclass(frozen=True, slots=True)
class _Origin:
    """The part of a stored tensor that a parameter is."""

    tensor: StoredTensor
    part: AxisSlice


def placement_of(assignment: Assignment) -> Placement:
    """The placement that an assignment carries out."""
    ranks = zip(assignment.nodes, assignment.layers, strict=True)
    return Placement(
        assignment.strategy,
        tuple(RankPlacement(rank, node, layers) for rank, (node, layers) in enumerate(ranks)),
        assignment.head,
    )


def trace_whole(assignment: Assignment) -> nn.Module:
    """The whole model as the checkpoint's headers describe it, lazily."""
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


@dataclass(frozen=True, slots=True)
class _OpenPart:
    """A rank's part before it is read.

    ``origins`` are those of the parameters to read by ranges, by the parameter's name;
    ``whole_sizes`` are those of the whole model's parameters as stored: bytes, and bytes of one
    element.
    """

    stage: Stage
    whole: WholeModel
    origins: dict[str, _Origin]
    whole_sizes: dict[str, tuple[int, int]]


def load_part(
    assignment: Assignment, group: Any | None, on_bytes: Callable[[int, int], None]
) -> LoadedPart:
    """Load the part of ``assignment.rank``.

    Args:
        group: the MLX group; None for a single rank.
        on_bytes: called with (bytes done, bytes in all) after each tensor and within large ones;
            there from another thread, while this one waits.

    Raises:
        K2Error: if the checkpoint cannot be read, or is not the one planned for.
    """
    checkpoint = read_checkpoint(Path(assignment.model_path))
    opened = _open_part(checkpoint, assignment, group or StandInGroup(0, 1))
    model = opened.stage.model
    total = sum(value.nbytes for value in parameters(model).values())
    _check_planned(checkpoint, assignment, opened.stage, total)
    read, taken = _read(opened, lambda done: on_bytes(done, total))
    held = [
        HeldTensor(name, list(value.shape), str(value.dtype), value.nbytes)
        for name, value in parameters(model).items()
    ]
    return LoadedPart(opened.stage, opened.whole, held, total, read, read - taken)


def _check_planned(
    checkpoint: Checkpoint, assignment: Assignment, stage: Stage, weights_bytes: int
) -> None:
    """Hold a part that is not read yet against what the plan says of this rank: exact bytes.

    Raises:
        K2Error: if they differ.
    """
    rank = assignment.rank
    held = [("weights", weights_bytes, assignment.expected_weights_bytes[rank])]
    if assignment.expected_cache_bytes:
        with running_model(checkpoint.config, "run as planned"):
            each = kv_cache_bytes(stage, assignment.context_length, assignment.prefill_chunk_tokens)
        cache_bytes = each * assignment.concurrency
        held.append(("KV cache", cache_bytes, assignment.expected_cache_bytes[rank]))
    for what, found, expected in held:
        if found != expected:
            raise K2Error(
                f"{checkpoint.folder} makes {found} bytes of {what} for rank {rank}, "
                f"the plan says {expected}",
                "plan again: k2 plan-memory MODEL",
            )


def _open_part(checkpoint: Checkpoint, assignment: Assignment, group: Any) -> _OpenPart:
    """Assemble and cut the model, lazily, and find out what its parameters are made of."""
    tensors = _open_tensors(checkpoint)
    model = assemble(checkpoint.config, tensors)
    stored_as = {id(array): checkpoint.tensors[name] for name, array in tensors.items()}
    whole = parameters(model)
    unchanged = {
        name: stored_as[id(array)] for name, array in whole.items() if id(array) in stored_as
    }
    whole_sizes = {name: (array.nbytes, array.itemsize) for name, array in whole.items()}
    if assignment.dtype != "checkpoint":
        cast(model, FLOAT_TYPES[assignment.dtype])
    whole = parameters(model)
    described = describe_whole(model)
    stage = cut(checkpoint.config, model, placement_of(assignment), group)
    part = parameters(stage.model)
    if assignment.strategy == "tensor":
        slices = part_slices(
            checkpoint.config, trace_whole(assignment), placement_of(assignment), group
        )
    else:
        slices = {
            name: AxisSlice.whole(name, array.shape)
            for name, array in part.items()
            if array is whole.get(name)
        }
    origins = {
        name: _Origin(unchanged[taken.source], taken)
        for name, taken in slices.items()
        if taken.source in unchanged
        and suits(unchanged[taken.source], taken)
        and taken.result_shape == tuple(part[name].shape)
    }
    return _OpenPart(stage, described, origins, whole_sizes)


def _read(opened: _OpenPart, on_bytes: Callable[[int], None]) -> tuple[int, int]:
    """Read the parameters, one by one; returns the bytes read and those of them that were taken."""
    model = opened.stage.model
    done = read = taken = 0
    with TensorReader() as reader:
        for name, *further_names in _places(model):
            origin = opened.origins.get(name)
            value = _parameter(model, name)
            if origin is None:
                whole, item = opened.whole_sizes.get(name, (value.nbytes, value.itemsize))
                read, taken = read + whole, taken + value.size * item
                value = _evaluated(value)
            else:
                value = _read_one(reader, origin, value.dtype, done, on_bytes)
            for place in (name, *further_names):
                _replace(model, place, value)
            done += value.nbytes
            on_bytes(done)
    return read + reader.bytes_read, taken + reader.bytes_taken


def _evaluated(value: mx.array) -> mx.array:
    """A parameter that mlx reads and computes."""
    # A slice may be a view that keeps its whole source alive: make it an array of its own.
    owned = mx.contiguous(value)
    mx.eval(owned)
    return owned


def _read_one(
    reader: TensorReader,
    origin: _Origin,
    dtype: mx.Dtype,
    done: int,
    on_bytes: Callable[[int], None],
) -> mx.array:
    """A parameter that is read by ranges, cast if it has another type than it is stored with."""
    stored_bits = DTYPE_BITS[origin.tensor.dtype]
    value = reader.read(
        origin.tensor,
        origin.part,
        lambda filled: on_bytes(done + filled * dtype.size * 8 // stored_bits),
    )
    if value.dtype != dtype:
        value = value.astype(dtype)
        mx.eval(value)
    return value


def _places(model: nn.Module) -> list[list[str]]:
    """The names of each parameter: several where one array stands in several places.

    Only names: whoever holds the arrays keeps what is replaced in memory.
    """
    names: dict[int, list[str]] = {}
    for name, value in tree_flatten(model.parameters()):
        names.setdefault(id(value), []).append(name)
    return list(names.values())


def _owner(model: nn.Module, name: str) -> tuple[Any, Any]:
    """What holds a parameter, and under which key, by its dotted name."""
    *path, last = name.split(".")
    owner: Any = model
    for step in path:
        owner = owner[int(step)] if isinstance(owner, list | tuple) else owner[step]
    return owner, int(last) if isinstance(owner, list) else last


def _parameter(model: nn.Module, name: str) -> mx.array:
    owner, key = _owner(model, name)
    value: mx.array = owner[key]
    return value


def _replace(model: nn.Module, name: str, value: mx.array) -> None:
    """Put one parameter back by its dotted name."""
    owner, key = _owner(model, name)
    owner[key] = value
