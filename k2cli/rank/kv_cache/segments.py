"""Segments of KV caches: the arrays of consecutive tokens in one cache entry, and joining them.

A segment has a tuple of arrays for each plain or quantized cache in the entry: one, or several if
the entry is a list of caches (deepseek_v32). Their second axis from the end counts tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx

from k2cli.mlx_lm_package import mlx_lm_module
from k2cli.sharding.kv_cache.quantized import QuantizedCache
from k2cli.sharding.stage import Stage, make_cache

Segment = list[tuple[mx.array, ...]]
_STEP_TOKENS = 256


def can_cut(stage: Stage) -> bool:
    """True if the caches of all layers of the whole model can be cut at any token."""
    return all(_can_cut(entry) for entry in make_cache(stage.model))


def _can_cut(cache: Any) -> bool:
    kinds = mlx_lm_module("models.cache")
    if type(cache) is kinds.CacheList:
        return all(map(_can_cut, cache.caches))
    return type(cache) is kinds.KVCache


def _leaves(cache: Any) -> list[Any]:
    """Return the plain caches of an entry."""
    return list(cache.caches) if hasattr(cache, "caches") else [cache]


def _arrays(cache: Any) -> tuple[mx.array, ...]:
    """Return the arrays of a plain cache, which may have room for more tokens; none if empty."""
    if isinstance(cache, QuantizedCache):
        return tuple(cache.arrays)
    return () if cache.keys is None else (cache.keys, cache.values)


def _fill(cache: Any, arrays: tuple[mx.array, ...], tokens: int) -> None:
    """Give an empty plain cache its arrays, in which the first ``tokens`` are valid."""
    if not arrays:
        return
    if isinstance(cache, QuantizedCache):
        cache.fill(arrays, tokens)
    else:
        cache.keys, cache.values = arrays
        cache.offset = tokens


def segment_of(cache: Any, first: int, past_last: int) -> Segment:
    """Copy the tokens ``first`` to ``past_last`` of a cache entry of one sequence."""
    return cut([_arrays(leaf) for leaf in _leaves(cache)], first, past_last)


def cut(segment: Segment, first: int, past_last: int) -> Segment:
    """Copy some tokens of a segment; evaluated, since a lazy slice keeps the whole array."""
    return _evaluated(
        [tuple(_copied(array, first, past_last) for array in arrays) for arrays in segment]
    )


def _copied(array: mx.array, first: int, past_last: int) -> mx.array:
    if first == 0 and past_last == array.shape[-2]:
        return array
    return mx.contiguous(array[..., first:past_last, :])


def joined(segments: Sequence[Segment], tokens: int, spare_tokens: int = 0) -> Segment:
    """Join segments to one of their first ``tokens``, with room for more after them; evaluated."""
    found: Segment = []
    for pieces in zip(*segments, strict=True):
        arrays = []
        for parts in zip(*pieces, strict=True):
            left, taken = tokens, []
            for part in parts:
                taken.append(part if part.shape[-2] <= left else part[..., :left, :])
                left -= taken[-1].shape[-2]
            if spare_tokens:
                shape = list(parts[0].shape)
                shape[-2] = spare_tokens
                taken.append(mx.zeros(shape, parts[0].dtype))
            arrays.append(mx.concatenate(taken, axis=-2) if len(taken) > 1 else taken[0])
        found.append(tuple(arrays))
    return _evaluated(found)


def fill(cache: Any, segments: Sequence[Segment], tokens: int) -> None:
    """Give an empty cache entry the first ``tokens`` of some segments in a row.

    The arrays are new ones: segments are shared by others. They have room for whole allocation
    steps, as mlx-lm would make it at the next token.
    """
    spare = (tokens // _STEP_TOKENS + 1) * _STEP_TOKENS - tokens
    for leaf, arrays in zip(_leaves(cache), joined(segments, tokens, spare), strict=True):
        _fill(leaf, arrays, tokens)


def arrays_of(segment: Segment) -> list[mx.array]:
    """Return all arrays of a segment, in order."""
    return [array for arrays in segment for array in arrays]


def _evaluated(segment: Segment) -> Segment:
    mx.eval(arrays_of(segment))
    return segment


def form(stage: Stage) -> str:
    """Describe the kinds of caches of the whole model, for what is stored on a disk."""
    return repr([_form(entry) for entry in make_cache(stage.model, stage.kv_bits)])


def _form(cache: Any) -> list[object]:
    return [(type(leaf).__name__, getattr(leaf, "stored_bits", None)) for leaf in _leaves(cache)]
