"""Tracing of models: a rank's part, made of lazy arrays that are never evaluated.

A placement is applied to a model of lazy arrays. A stand-in group cuts tensor slices; while a
sliced model is traced, stand-ins replace the collectives that it calls.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from k2cli.errors import K2Error, UsageError
from k2cli.sharding.architectures import MODEL_FAILURES
from k2cli.sharding.assemble import assemble
from k2cli.sharding.model_errors import explain_failure
from k2cli.sharding.placement import Placement
from k2cli.sharding.stage import Stage, anatomy, cut_stage
from k2cli.sharding.stand_ins import without_values
from k2cli.sharding.tensor import StandInGroup, slice_model

# safetensors' names of element types; fp8 is read as bytes, as mlx does.
STORED_TYPES: Mapping[str, mx.Dtype] = {
    "F64": mx.float32, "F32": mx.float32, "F16": mx.float16, "BF16": mx.bfloat16,
    "I64": mx.int64, "I32": mx.int32, "I16": mx.int16, "I8": mx.int8,
    "U64": mx.uint64, "U32": mx.uint32, "U16": mx.uint16, "U8": mx.uint8,
    "BOOL": mx.bool_, "F8_E4M3": mx.uint8, "F8_E8M0": mx.uint8,
}  # fmt: skip

StoredShapes = Mapping[str, tuple[str, tuple[int, ...]]]
"""Stored tensors by name: the safetensors name of the element type, and the shape."""


def placeholders(stored: StoredShapes) -> dict[str, mx.array]:
    """Make lazy zeros with the shapes of a checkpoint's tensors.

    Raises:
        K2Error: for an element type that MLX cannot read.
    """
    weights: dict[str, mx.array] = {}
    for name, (dtype, shape) in stored.items():
        if dtype not in STORED_TYPES:
            raise K2Error(f"tensor {name} has element type {dtype}, which MLX cannot read")
        weights[name] = mx.zeros(shape, dtype=STORED_TYPES[dtype])
    return weights


def trace_model(
    config: Mapping[str, Any], stored: StoredShapes | None = None, dtype: str = "checkpoint"
) -> nn.Module:
    """Build the whole model lazily, from the checkpoint's headers if there are any.

    Raises:
        UsageError: if the config makes no model.
        K2Error: if the headers do not fit the config.
    """
    return assemble(config, placeholders(stored) if stored else None, dtype)


def cut(config: Mapping[str, Any], model: nn.Module, placement: Placement, group: Any) -> Stage:
    """Cut an assembled model to the part of ``group.rank()``, for planning and for loading.

    Raises:
        UsageError: if the model cannot be cut so.
    """
    first, past_last = placement.ranks[group.rank()].layers
    if placement.strategy == "tensor":
        slice_model(config, model, group, placement.head)
    return cut_stage(model, first, past_last)


def trace_rank(
    config: Mapping[str, Any],
    placement: Placement,
    rank: int,
    *,
    stored: StoredShapes | None = None,
    dtype: str = "checkpoint",
) -> Stage:
    """Build one rank's part lazily."""
    model = trace_model(config, stored, dtype)
    return cut(config, model, placement, StandInGroup(rank, placement.size))


@contextlib.contextmanager
def running_model(config: Mapping[str, Any], attempt: str) -> Iterator[None]:
    """Turn failures of mlx-lm's code for a model into usage errors.

    Raises:
        UsageError: with the attempt and the cause of the failure.
    """
    try:
        yield
    except MODEL_FAILURES as error:
        raise UsageError(
            f"mlx-lm's {config.get('model_type')} model cannot be {attempt}: "
            f"{explain_failure(error, config)}"
        ) from error


@contextlib.contextmanager
def lazily(model: nn.Module) -> Iterator[None]:
    """Let a model run without computing anything: no collectives, and no values read."""
    with without_collectives(), without_values(model):
        yield


@contextlib.contextmanager
def without_collectives() -> Iterator[None]:
    """Replace collectives by functions that return an array of the result's shape."""
    all_sum, all_gather = mx.distributed.all_sum, mx.distributed.all_gather
    mx.distributed.all_sum = lambda x, **_: x
    mx.distributed.all_gather = lambda x, *, group, **_: mx.concatenate([x] * group.size())
    try:
        yield
    finally:
        mx.distributed.all_sum, mx.distributed.all_gather = all_sum, all_gather


def parameters(model: nn.Module) -> dict[str, mx.array]:
    """Return parameters by name; an array with two names counts once."""
    seen: set[int] = set()
    unique: dict[str, mx.array] = {}
    for name, value in tree_flatten(model.parameters()):
        if id(value) not in seen:
            seen.add(id(value))
            unique[name] = value
    return unique


def layer_count(model: nn.Module) -> int:
    """Return the number of decoder layers."""
    return len(anatomy(model).layers)
