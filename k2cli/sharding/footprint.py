"""Exact bytes that ranks hold: weights and KV cache, by tracing the very classes that will run."""

from __future__ import annotations

import copy
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

CHUNK_TOKENS = 512
"""Prefill chunk where none is said. Caches with a window hold a whole one beside it."""


@dataclass(frozen=True, slots=True)
class RankFootprint:
    """What one rank holds, in bytes. ``kv_cache_bytes`` is for all sequences together."""

    rank: int
    weights_bytes: int
    kv_cache_bytes: int


def weights_bytes(stage: Stage) -> int:
    """Bytes of a rank's parameters."""
    return sum(value.nbytes for value in trace.parameters(stage.model).values())


def kv_cache_bytes(stage: Stage, context_length: int, chunk_tokens: int = CHUNK_TOKENS) -> int:
    """Bytes of one sequence's cache on this rank, at most, until ``context_length`` tokens.

    One token is run through the stage lazily, which tells the shapes of what every layer keeps;
    fresh cache objects of the model's own kinds are then fed zeros of these shapes, in chunks as
    a prefill does. Their allocation steps and windows are so included.
    """
    cache = stage.make_cache()
    tokens = mx.zeros((1, 1), dtype=mx.int32)
    arrived = None if stage.is_first else mx.zeros((1, 1, stage.width), dtype=stage.dtype)
    with trace.without_collectives():
        stage.forward(tokens, cache, arrived)
    used = stage.local(cache)
    fresh = stage.make_local_cache()
    return sum(
        filled_cache_bytes(entry, sample, context_length, chunk_tokens)
        for entry, sample in zip(fresh, used, strict=True)
    )


def cache_window(entry: Any) -> int | None:
    """Tokens beyond which a cache entry forgets the oldest; None if it does not.

    Rotating caches have a ``max_size``; those of chunked attention (Llama 4) a ``chunk_size``.
    """
    window = getattr(entry, "max_size", None) or getattr(entry, "chunk_size", None)
    return window if isinstance(window, int) else None


def filled_cache_bytes(
    entry: Any, sample: Any, context_length: int, chunk_tokens: int = CHUNK_TOKENS
) -> int:
    """The most bytes of a fresh cache entry on its way to a whole context.

    Args:
        sample: an entry of the same kind that has seen one token.
    """
    parts = getattr(entry, "caches", None)
    if parts is not None:  # a CacheList
        return sum(
            filled_cache_bytes(part, other, context_length, chunk_tokens)
            for part, other in zip(parts, sample.caches, strict=True)
        )
    keys, values = getattr(sample, "keys", None), getattr(sample, "values", None)
    if not isinstance(keys, mx.array) or not isinstance(values, mx.array):
        return int(sample.nbytes)  # recurrent state: does not grow with the context
    window = cache_window(entry)
    if window is None:
        return _most_bytes(entry, sample, [context_length])
    # Such a cache goes round: whole chunks beyond a few windows change nothing.
    beyond = context_length - window - 3 * chunk_tokens
    context_length -= max(0, beyond // chunk_tokens * chunk_tokens)
    # It holds a whole chunk beside its window, and grows by a step for the first token of an
    # answer: more, each time, than once it has come round.
    return max(
        _most_bytes(copy.copy(entry), sample, lengths)
        for lengths in (
            _chunks(context_length, chunk_tokens),
            [*_chunks(context_length - 1, chunk_tokens), 1],
        )
    )


def _chunks(tokens: int, chunk_tokens: int) -> list[int]:
    return [min(chunk_tokens, tokens - first) for first in range(0, tokens, chunk_tokens)]


def _most_bytes(entry: Any, sample: Any, lengths: list[int]) -> int:
    """Feed zeros of a sample's shape, as a model does; what the entry holds at most."""
    most = 0
    forget = getattr(entry, "maybe_trim_front", lambda: None)
    for length in lengths:
        forget()  # Llama 4 calls it before every pass
        entry.update_and_fetch(*(_zeros(part, length) for part in (sample.keys, sample.values)))
        most = max(most, int(entry.nbytes))
    return most


def _zeros(sample: mx.array, length: int) -> mx.array:
    """Keys or values ``[1, heads, length, width]`` like a sample's."""
    return mx.zeros((1, sample.shape[1], length, sample.shape[3]), dtype=sample.dtype)


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
        cache = kv_cache_bytes(stage, context_length) * concurrency
        weights = weights_bytes(stage)  # after a run, which may have changed their type
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
