"""Bytes of weights and caches of every rank of a placement, by tracing rank after rank."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from k2cli.sharding import trace
from k2cli.sharding.placement import Placement
from k2cli.sharding.trace import StoredShapes
from k2cli.sharding.weights_and_cache import kv_cache_bytes, weights_bytes


@dataclass(frozen=True, slots=True)
class RankFootprint:
    """Bytes that one rank holds; ``kv_cache_bytes`` of all sequences together."""

    rank: int
    weights_bytes: int
    kv_cache_bytes: int


def footprints(
    config: Mapping[str, Any],
    placement: Placement,
    *,
    context_length: int,
    concurrency: int = 1,
    stored: StoredShapes | None = None,
    dtype: str = "checkpoint",
) -> list[RankFootprint]:
    """Trace the bytes of weights and caches of every rank of a placement."""
    result = []
    for rank in range(placement.size):
        stage = trace.trace_rank(config, placement, rank, stored=stored, dtype=dtype)
        cache = kv_cache_bytes(stage, context_length) * concurrency
        weights = weights_bytes(stage)  # after a run, which may have changed their type
        result.append(RankFootprint(rank, weights, cache))
    return result
