"""Sizes of the parts of a model, from which the size of any stage is a sum.

Tracing a placement rank by rank takes tenths of a second; a search for the best placement, or for
the longest context, needs thousands. A profile is traced once, from the whole model or from one
tensor slice, and gives the bytes of every range of layers and every context. They equal those that
``weights_and_cache`` traces (tests/sharding/test_profile.py compares the two).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from k2cli.sharding import trace
from k2cli.sharding.kv_cache.quantized import QuantizedCache, quantized_bytes
from k2cli.sharding.stage import anatomy, make_cache
from k2cli.sharding.weights_and_cache import (
    CHUNK_TOKENS,
    cache_window,
    filled_cache_bytes,
    head_form,
)


@dataclass(frozen=True, slots=True)
class QuantizedLayer:
    """Bytes of a token in the largest quantized cache of a layer, and once dequantized."""

    bits: int
    stored_bytes: int
    dequantized_bytes: int


@dataclass(slots=True)
class Profile:
    """Bytes of a whole model, or of one tensor slice, part by part.

    ``embedding_bytes`` are on the first stage, ``output_bytes`` (norm and head) on the last, which
    also holds ``tied_bytes`` of the embedding if that is also the head; ``common_bytes``, the rest,
    are on every stage.
    """

    layer_bytes: tuple[int, ...]
    embedding_bytes: int
    output_bytes: int
    tied_bytes: int
    common_bytes: int
    _model: nn.Module
    _samples: Sequence[Any]
    _kinds: tuple[str, ...]
    _kv_bits: int = 0
    _caches: dict[tuple[int, int], tuple[int, ...]] = field(default_factory=dict)

    @property
    def layer_count(self) -> int:
        """Number of decoder layers."""
        return len(self.layer_bytes)

    def edges_bytes(self, first: int, past_last: int) -> int:
        """Return the bytes that a stage of these layers holds beside the layers."""
        edges = self.common_bytes
        if first == 0:
            edges += self.embedding_bytes
        if past_last == self.layer_count:
            edges += self.output_bytes + (self.tied_bytes if first else 0)
        return edges

    def weights_bytes(self, first: int, past_last: int) -> int:
        """Return the bytes of the stage of the layers ``[first, past_last)``."""
        return sum(self.layer_bytes[first:past_last]) + self.edges_bytes(first, past_last)

    def weights_before(self) -> list[int]:
        """Return ``layer_count + 1`` numbers: the bytes before each layer, and of all layers."""
        return list(accumulate(self.layer_bytes, initial=0))

    def cache_bytes(self, context_length: int, chunk_tokens: int = CHUNK_TOKENS) -> tuple[int, ...]:
        """Return the most bytes of each entry of one sequence's cache, up to a whole context.

        Most models have an entry per layer; only those can be cut into stages. The prefill's
        ``chunk_tokens`` matter only if a cache has a window.
        """
        key = context_length, chunk_tokens if self._has_windows else 0
        if key not in self._caches:
            fresh = make_cache(self._model, self._kv_bits)
            by_kind: dict[str, int] = {}
            for entry, sample, kind in zip(fresh, self._samples, self._kinds, strict=True):
                if kind not in by_kind:
                    by_kind[kind] = filled_cache_bytes(entry, sample, context_length, chunk_tokens)
            self._caches[key] = tuple(by_kind[kind] for kind in self._kinds)
        return self._caches[key]

    @property
    def quantized_layer(self) -> QuantizedLayer | None:
        """The layer with the largest quantized keys and values; None if none are quantized."""
        found = []
        for entry in self._samples:
            if isinstance(entry, QuantizedCache) and (form := entry.form) is not None:
                size = form.dtype.size
                stored = form.heads * quantized_bytes(form.widths, entry.stored_bits, size)
                whole = form.heads * sum(form.widths) * size
                found.append(QuantizedLayer(entry.stored_bits, stored, whole))
        return max(found, key=lambda layer: layer.dequantized_bytes, default=None)

    @property
    def _has_windows(self) -> bool:
        return any(_windows(entry) for entry in self._samples)


def profile_model(model: nn.Module, kv_bits: int = 0) -> Profile:
    """Profile a lazily assembled model, which may be a tensor slice. Nothing is evaluated.

    Args:
        kv_bits: bits of quantized caches; 0 for those of the model.

    Raises:
        UsageError: if the model has no list of decoder layers.
    """
    parts = anatomy(model)
    # Run the model first: gemma3n converts some of its weights to float32 when it runs.
    samples = _used_caches(model, kv_bits)
    seen: set[int] = set()
    layers = tuple(_new_bytes(layer, seen) for layer in parts.layers)
    sizes = [_new_bytes(parent[name], seen) for parent, name in parts.embeddings]
    largest = max(sizes, default=0)
    outputs = sum(_new_bytes(parent[name], seen) for parent, name in parts.outputs)
    everything = sum(value.nbytes for value in trace.parameters(model).values())
    common = everything - sum(layers) - sum(sizes) - outputs
    kinds = tuple(_kind(entry) for entry in samples)
    tied = largest if parts.tied else 0
    return Profile(layers, sum(sizes), outputs, tied, common, model, samples, kinds, kv_bits)


def _new_bytes(module: nn.Module, seen: set[int]) -> int:
    """Return the bytes of a module's parameters that no earlier part has."""
    new = {id(value): value.nbytes for value in trace.parameters(module).values()}
    fresh = sum(size for identity, size in new.items() if identity not in seen)
    seen |= new.keys()
    return fresh


def _used_caches(model: nn.Module, kv_bits: int) -> list[Any]:
    """Return cache entries after one lazy token: they show the shapes that each layer keeps."""
    cache = make_cache(model, kv_bits)
    with trace.lazily(model):
        model(mx.zeros((1, 1), dtype=mx.int32), cache=cache)
    return cache


def _windows(entry: Any) -> bool:
    return any(cache_window(part) for part in getattr(entry, "caches", (entry,)))


def _kind(entry: Any) -> str:
    """Return a key that is equal for entries that take the same bytes for the same context."""
    parts = getattr(entry, "caches", None)
    if parts is not None:  # a CacheList
        return f"[{', '.join(_kind(part) for part in parts)}]"
    form = head_form(entry)
    if form is None:
        return f"{type(entry).__name__} {entry.nbytes}"
    return f"{type(entry).__name__} {form} {cache_window(entry)}"
