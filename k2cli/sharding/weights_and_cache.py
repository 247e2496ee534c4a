"""Exact bytes of weights and KV cache, by tracing the classes that will run."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from k2cli.sharding import trace
from k2cli.sharding.kv_cache.quantized import HeadForm
from k2cli.sharding.stage import Stage
from k2cli.sharding.trace import StoredShapes

CHUNK_TOKENS = 512
"""Default prefill chunk. A cache with a window holds a whole chunk beside it."""


def weights_bytes(stage: Stage) -> int:
    """Return the bytes of a rank's parameters."""
    return sum(value.nbytes for value in trace.parameters(stage.model).values())


def kv_cache_bytes(stage: Stage, context_length: int, chunk_tokens: int = CHUNK_TOKENS) -> int:
    """Return the most bytes of one sequence's cache on this rank, up to ``context_length`` tokens.

    A lazy run of one token shows the shapes that every layer keeps; fresh cache objects of the
    model's own kinds are then fed zeros of these shapes, in chunks as a prefill does. So their
    allocation steps and windows are included.
    """
    cache = stage.make_cache()
    tokens = mx.zeros((1, 1), dtype=mx.int32)
    arrived = None if stage.is_first else mx.zeros((1, 1, stage.width), dtype=stage.dtype)
    with trace.lazily(stage.model):
        stage.forward(tokens, cache, arrived)
    used = stage.local(cache)
    fresh = stage.make_local_cache()
    return sum(
        filled_cache_bytes(entry, sample, context_length, chunk_tokens)
        for entry, sample in zip(fresh, used, strict=True)
    )


def cache_window(entry: Any) -> int | None:
    """Return the tokens after which a cache entry drops the oldest; None if it keeps all.

    Rotating caches have a ``max_size``; those of chunked attention (Llama 4) a ``chunk_size``.
    """
    window = getattr(entry, "max_size", None) or getattr(entry, "chunk_size", None)
    return window if isinstance(window, int) else None


def filled_cache_bytes(
    entry: Any, sample: Any, context_length: int, chunk_tokens: int = CHUNK_TOKENS
) -> int:
    """Return the most bytes of a fresh cache entry while it fills up to a whole context.

    Args:
        sample: an entry of the same kind that has seen one token.
    """
    parts = getattr(entry, "caches", None)
    if parts is not None:  # a CacheList
        return sum(
            filled_cache_bytes(part, other, context_length, chunk_tokens)
            for part, other in zip(parts, sample.caches, strict=True)
        )
    form = head_form(sample)
    if form is None:
        return int(sample.nbytes)  # recurrent state: does not grow with the context
    window = cache_window(entry)
    if window is None:
        return _most_bytes(entry, form, [context_length])
    # Such a cache is a ring: more whole chunks after a few windows change nothing.
    beyond = context_length - window - 3 * chunk_tokens
    context_length -= max(0, beyond // chunk_tokens * chunk_tokens)
    # It holds a whole chunk beside its window, and grows by an allocation step for the first token
    # of an answer. Both may be more than its size once the ring is full.
    return max(
        _most_bytes(copy.copy(entry), form, lengths)
        for lengths in (
            _chunks(context_length, chunk_tokens),
            [*_chunks(context_length - 1, chunk_tokens), 1],
        )
    )


def _chunks(tokens: int, chunk_tokens: int) -> list[int]:
    return [min(chunk_tokens, tokens - first) for first in range(0, tokens, chunk_tokens)]


def head_form(sample: Any) -> HeadForm | None:
    """Return the form of keys and values that a used entry keeps; None if it keeps a state."""
    form = getattr(sample, "form", None)
    if isinstance(form, HeadForm):
        return form  # of a quantized cache
    keys, values = getattr(sample, "keys", None), getattr(sample, "values", None)
    if not isinstance(keys, mx.array) or not isinstance(values, mx.array):
        return None
    return HeadForm(keys.shape[1], (keys.shape[3], values.shape[3]), keys.dtype)


def _most_bytes(entry: Any, form: HeadForm, lengths: list[int]) -> int:
    """Feed zeros of this form, as a model does; return the most bytes of the entry."""
    most = 0
    forget = getattr(entry, "maybe_trim_front", lambda: None)
    for length in lengths:
        forget()  # Llama 4 calls it before every pass
        entry.update_and_fetch(*form.zeros(length))
        most = max(most, int(entry.nbytes))
    return most


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """Facts about a whole model that planning needs before it chooses a placement."""

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
    """Return the number of parameters before any quantization."""
    from k2cli.sharding.assemble import build

    return sum(int(value.size) for value in trace.parameters(build(config)).values())
