"""Loading of a rank's part of a checkpoint: opened lazily, cut, then read tensor by tensor.

A parameter that is a slice of a stored tensor, or a whole large one, is read by ranges of its file
into memory of its own. A parameter that is computed from stored tensors (experts stacked, fp8
expanded) is evaluated by mlx, which then reads those tensors whole. Parameters are loaded one at a
time, so the memory in use never exceeds what is loaded, plus one parameter and its sources.

Projections of the same input that are joined (``rank.joined_projections``) are read into the memory
of the joined matrix, so that the two forms never exist beside each other. Where mlx computes them
from other tensors, the two forms of one parameter exist for a moment, and only small ones are
joined: up to ``MOST_COMPUTED_BYTES``, which is less than a plan has for the program itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from k2cli.errors import K2Error
from k2cli.models.checkpoint import Checkpoint, read_checkpoint
from k2cli.models.safetensors_header import DTYPE_BITS, StoredTensor
from k2cli.protocol import Assignment, HeldTensor
from k2cli.rank.absent_files import open_absent, refuse_absent, refused_if_absent
from k2cli.rank.attention.latent import use_own_attention
from k2cli.rank.host_buffers import copies_from_host, reused_host_memory
from k2cli.rank.joined_projections import JoinedParameter, join_projections, joins_here
from k2cli.rank.kernels.device import avoid_wrong_kernels
from k2cli.rank.kernels.experts import stays_whole
from k2cli.rank.tensor_reader import TensorReader, suits
from k2cli.sharding.assemble import FLOAT_TYPES, assemble, cast
from k2cli.sharding.coverage import WholeModel, describe_whole
from k2cli.sharding.joined_pairs import ProjectionPair
from k2cli.sharding.kv_cache.attention import use_own_quantized_attention
from k2cli.sharding.latent_ways import LatentSettings
from k2cli.sharding.placement import Placement, RankPlacement
from k2cli.sharding.slices import AxisSlice, part_slices
from k2cli.sharding.stage import Stage
from k2cli.sharding.stored_weights import FileReads, gpu_waits_for_reads
from k2cli.sharding.tensor import StandInGroup
from k2cli.sharding.trace import cut, parameters, running_model, trace_model
from k2cli.sharding.weights_and_cache import kv_cache_bytes

MOST_COMPUTED_BYTES = 512 * 2**20
"""Bytes of a joined parameter that may exist beside the two that it is made of."""


@dataclass(frozen=True, slots=True)
class LoadedPart:
    """A rank's part, evaluated, and the list of its tensors; ``whole`` describes the whole model.

    ``bytes_read`` counts bytes read from the files, without headers; ``bytes_over_read`` is the
    part of them that is in no parameter (``tensor_reader`` explains it). For a parameter that mlx
    evaluates, the whole array that it is cut from counts as read.
    """

    stage: Stage
    whole: WholeModel
    held: list[HeldTensor]
    weights_bytes: int
    bytes_read: int = 0
    bytes_over_read: int = 0


@dataclass(frozen=True, slots=True)
class _Origin:
    """A slice of a stored tensor that becomes one parameter."""

    tensor: StoredTensor
    part: AxisSlice


def placement_of(assignment: Assignment) -> Placement:
    """Return the placement that an assignment is part of."""
    ranks = zip(assignment.nodes, assignment.layers, strict=True)
    return Placement(
        assignment.strategy,
        tuple(RankPlacement(rank, node, layers) for rank, (node, layers) in enumerate(ranks)),
        assignment.head,
    )


def trace_whole(assignment: Assignment) -> nn.Module:
    """Build the whole model lazily from the checkpoint's headers."""
    checkpoint = read_checkpoint(Path(assignment.model_path))
    stored = {name: (t.dtype, t.shape) for name, t in checkpoint.tensors.items()}
    return trace_model(checkpoint.config, stored, assignment.dtype)


def _open_tensors(checkpoint: Checkpoint) -> dict[str, mx.array]:
    """Open every stored tensor lazily: only the headers of the files are read."""
    if not checkpoint.tensors:
        raise K2Error(f"{checkpoint.folder} holds no safetensors files")
    tensors: dict[str, mx.array] = {}
    for file in sorted({tensor.file for tensor in checkpoint.tensors.values()}):
        here = file.name not in checkpoint.absent
        opened = mx.load(str(file)) if here else open_absent(checkpoint.folder, file.name)
        assert isinstance(opened, dict)
        tensors.update(opened)
    return {name: tensors[name] for name in checkpoint.tensors}


@dataclass(frozen=True, slots=True)
class _OpenPart:
    """A rank's part before it is read.

    ``origins`` holds the origins of each parameter that is read by ranges, by the parameter's name:
    two of a joined parameter, else one. ``joined`` are the joined parameters by their names;
    ``whole_sizes`` the size of each of the whole model's parameters as stored: its bytes, and the
    bytes of one element. ``reads`` are those for the other parameters, where a GPU must not wait
    for them.
    """

    stage: Stage
    whole: WholeModel
    origins: dict[str, list[_Origin]]
    whole_sizes: dict[str, tuple[int, int]]
    joined: dict[str, JoinedParameter]
    reads: FileReads | None = None


def load_part(
    assignment: Assignment, group: Any | None, on_bytes: Callable[[int, int], None]
) -> LoadedPart:
    """Load the part of the model that ``assignment.rank`` holds.

    Args:
        group: the MLX group; None for a single rank.
        on_bytes: called with (bytes done, bytes in all) after each tensor, and from another thread
            within large ones.

    Raises:
        K2Error: if the checkpoint cannot be read, or differs from the plan's.
    """
    checkpoint = read_checkpoint(Path(assignment.model_path))
    opened = _open_part(checkpoint, assignment, group or StandInGroup(0, 1))
    model = opened.stage.model
    total = sum(value.nbytes for value in parameters(model).values())
    _check_planned(checkpoint, assignment, opened.stage, total)
    read_tensors = [origin.tensor for found in opened.origins.values() for origin in found]
    refuse_absent(read_tensors, checkpoint.absent)
    with refused_if_absent(checkpoint.folder, checkpoint.absent):
        read, taken = _read(opened, lambda done: on_bytes(done, total))
    held = _held_tensors(parameters(model), opened.joined)
    avoid_wrong_kernels(model)
    if assignment.kv_bits:
        use_own_quantized_attention()
    use_own_attention(
        model, LatentSettings(assignment.expansion_weight, assignment.attention_block_tokens)
    )
    return LoadedPart(opened.stage, opened.whole, held, total, read, read - taken)


def _check_planned(
    checkpoint: Checkpoint, assignment: Assignment, stage: Stage, weights_bytes: int
) -> None:
    """Compare the exact bytes of a part, before it is read, with the plan's.

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
    """Assemble and cut the model lazily, and find the origins of its parameters."""
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
    stage.kv_bits = assignment.kv_bits
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
        name: [_Origin(unchanged[taken.source], taken)]
        for name, taken in slices.items()
        if taken.source in unchanged
        and suits(unchanged[taken.source], taken)
        and taken.result_shape == tuple(part[name].shape)
    }
    joined: dict[str, JoinedParameter] = {}
    if joins_here(assignment.joins_projections):
        joined = join_projections(stage.model, partial(_may_join, origins))
        for name, of in joined.items():
            pair = [origin for each in of.names for origin in origins.pop(each, [])]
            if _are_read_together(pair, of.axis):
                origins[name] = pair
    computed = parameters(stage.model).keys() - origins.keys()
    reads = FileReads(tensors.values()) if computed and gpu_waits_for_reads() else None
    return _OpenPart(stage, described, origins, whole_sizes, joined, reads)


def _may_join(
    origins: Mapping[str, list[_Origin]], pair: ProjectionPair, parts: Sequence[JoinedParameter]
) -> bool:
    """True if two projections become one product, with no memory beside it while loading."""
    if copies_from_host() and not stays_whole(*pair.members):
        return False
    for part in parts:
        name = part.names[0].rpartition(".")[2]
        values = [member[name] for member in pair.members]
        if sum(value.nbytes for value in values) <= MOST_COMPUTED_BYTES:
            continue
        read = [origin for each in part.names for origin in origins.get(each, [])]
        is_cast = any(DTYPE_BITS[origin.tensor.dtype] != 8 * values[0].itemsize for origin in read)
        if is_cast or not _are_read_together(read, part.axis):
            return False
    return True


def _are_read_together(pair: Sequence[_Origin], axis: int) -> bool:
    """True if two slices can be read into one array, one behind the other along ``axis``."""
    return (
        len(pair) == 2
        and pair[0].tensor.dtype == pair[1].tensor.dtype
        and all(origin.part.is_whole or origin.part.axis >= axis for origin in pair)
    )


def _held_tensors(
    loaded: Mapping[str, mx.array], joined: Mapping[str, JoinedParameter]
) -> list[HeldTensor]:
    """List the loaded tensors by the names and shapes that they have in the model as stored."""
    held = []
    for name, value in loaded.items():
        of = joined.get(name)
        for part, shape in [(name, list(value.shape))] if of is None else of.shapes(value.shape):
            held.append(HeldTensor(part, shape, str(value.dtype), prod(shape) * value.itemsize))
    return held


def _read(opened: _OpenPart, on_bytes: Callable[[int], None]) -> tuple[int, int]:
    """Read the parameters one by one; return the bytes read, and those that parameters hold."""
    model = opened.stage.model
    done = read = taken = 0
    buffers = reused_host_memory() if copies_from_host() else nullcontext()
    with TensorReader() as reader, buffers:
        for name, *further_names in _places(model):
            origins = opened.origins.get(name)
            value = _parameter(model, name)
            if origins is None:
                whole, item = _stored_size(opened, name, value)
                read, taken = read + whole, taken + value.size * item
                if opened.reads is not None:
                    opened.reads.read_for(value)
                value = _evaluated(value)
            else:
                axis = opened.joined[name].axis if len(origins) > 1 else 0
                value = _read_one(reader, origins, axis, value.dtype, done, on_bytes)
            for place in (name, *further_names):
                _replace(model, place, value)
            done += value.nbytes
            on_bytes(done)
    return read + reader.bytes_read, taken + reader.bytes_taken


def _stored_size(opened: _OpenPart, name: str, value: mx.array) -> tuple[int, int]:
    """Return the bytes as stored of what a parameter is made of, and those of one element."""
    of = opened.joined.get(name)
    names = (name,) if of is None else of.names
    sizes = [opened.whole_sizes[each] for each in names if each in opened.whole_sizes]
    if len(sizes) < len(names):
        return value.nbytes, value.itemsize
    return sum(whole for whole, _ in sizes), sizes[0][1]


def _evaluated(value: mx.array) -> mx.array:
    """Let mlx read and compute a parameter."""
    # A slice may be a view that keeps its whole source in memory: copy it.
    owned = mx.contiguous(value)
    mx.eval(owned)
    return owned


def _read_one(
    reader: TensorReader,
    origins: Sequence[_Origin],
    axis: int,
    dtype: mx.Dtype,
    done: int,
    on_bytes: Callable[[int], None],
) -> mx.array:
    """Read a parameter by ranges, and cast it if it is stored with another type."""
    stored_bits = DTYPE_BITS[origins[0].tensor.dtype]
    value = reader.read_joined(
        [(origin.tensor, origin.part) for origin in origins],
        axis,
        lambda filled: on_bytes(done + filled * dtype.size * 8 // stored_bits),
    )
    if value.dtype != dtype:
        value = value.astype(dtype)
        mx.eval(value)
    return value


def _places(model: nn.Module) -> list[list[str]]:
    """List the names of each parameter: several if the model uses one array in several places.

    The result holds no arrays, because a reference would keep a replaced array in memory.
    """
    names: dict[int, list[str]] = {}
    for name, value in tree_flatten(model.parameters()):
        names.setdefault(id(value), []).append(name)
    return list(names.values())


def _owner(model: nn.Module, name: str) -> tuple[Any, Any]:
    """Find a parameter by its dotted name; return the module or list that holds it, and its key."""
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
    """Replace one parameter by its dotted name."""
    owner, key = _owner(model, name)
    owner[key] = value
