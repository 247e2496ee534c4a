"""Exact bytes that ranks hold: weights and KV cache, by tracing the very classes that will run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from k2cli.sharding import trace
from k2cli.sharding.placement import Placement
from k2cli.sharding.stage import Stage
from k2cli.sharding.tensor import tensor_obstacle as _tensor_obstacle
from k2cli.sharding.trace import StoredShapes


@dataclass(frozen=True, slots=True)
class RankFootprint:
    """What one rank holds, in bytes. ``kv_cache_bytes`` is for all sequences together."""

    rank: int
    weights_bytes: int
    kv_cache_bytes: int


def weights_bytes(stage: Stage) -> int:
    """Bytes of a rank's parameters."""
    return sum(value.nbytes for value in trace.parameters(stage.model).values())


def kv_cache_bytes(stage: Stage, context_length: int) -> int:
    """Bytes of one sequence's cache on this rank once it holds ``context_length`` tokens.

    Feeds the model's own cache objects lazily; their allocation steps are included.
    """
    cache = stage.make_cache()
    tokens = mx.zeros((1, context_length), dtype=mx.int32)
    arrived = None
    if not stage.is_first:
        arrived = mx.zeros((1, context_length, stage.width), dtype=stage.dtype)
    with trace.without_collectives():
        stage.forward(tokens, cache, arrived)
    return sum(int(entry.nbytes) for entry in stage.local(cache))


def footprints(
    config: Mapping[str, Any],
    placement: Placement,
    *,
    context_length: int,
    concurrency: int = 1,
    stored: StoredShapes | None = None,
    dtype: str = "checkpoint",
) -> list[RankFootprint]:
    """Weights and cache bytes of every rank of a placement.

    Args:
        stored: shapes from the checkpoint's headers; None plans from the config alone.
        dtype: ``checkpoint`` or a float type that everything is cast to.

    Raises:
        UsageError: if the config makes no model, or it cannot be cut so.
    """
    result = []
    for rank in range(placement.size):
        stage = trace.trace_rank(config, placement, rank, stored=stored, dtype=dtype)
        weights = weights_bytes(stage)
        cache = kv_cache_bytes(stage, context_length) * concurrency
        result.append(RankFootprint(rank, weights, cache))
    return result


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What planning needs to know of a whole model before it places it."""

    layer_count: int
    parameter_count: int
    model: nn.Module


def model_facts(
    config: Mapping[str, Any], stored: StoredShapes | None = None, dtype: str = "checkpoint"
) -> ModelFacts:
    """Trace a whole model once.

    Raises:
        UsageError: if the config makes no model or one without decoder layers.
    """
    model = trace.trace_model(config, stored, dtype)
    return ModelFacts(trace.layer_count(model), parameter_count(config), model)


def parameter_count(config: Mapping[str, Any]) -> int:
    """Number of parameters before any quantization."""
    from k2cli.sharding.assemble import build

    return sum(int(value.size) for value in trace.parameters(build(config)).values())


def tensor_obstacle(config: Mapping[str, Any], ranks: int) -> str | None:
    """Why tensor parallelism over that many ranks is impossible, with the numbers, or None.

    Cuts a traced copy, so that quantization groups that do not divide are found too.
    """
    from k2cli.errors import UsageError
    from k2cli.sharding.tensor import StandInGroup, slice_model

    model = trace.trace_model(config)
    obstacle = _tensor_obstacle(config, model, ranks)
    if obstacle is None:
        try:
            slice_model(config, model, StandInGroup(0, ranks))
        except UsageError as error:
            obstacle = error.message.removeprefix("tensor parallelism is not possible: ")
    return obstacle
