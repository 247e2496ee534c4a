"""The ledger of one node: what goes in, what it adds up to, and what is left. Pure arithmetic."""

from __future__ import annotations

from k2cli.planning.hardware import NodeMemory
from k2cli.planning.plan import NodeBudget
from k2cli.units import MB

RUNTIME_BYTES = 600 * MB
"""Assumed per rank: the rank's and the guard's Python, MLX and its compiled kernels, tokenizer and
template, send and receive buffers. What the operating system keeps is not here: the node's limit
is already without it."""

ALLOCATOR_SLACK_SHARE = 0.03
"""Assumed: what the allocator keeps cached or loses to rounding, of all that is not weights.
Weights are allocated once and fit their buffers."""


def overhead_bytes(kv_cache_bytes: int, activation_bytes: int, layers: int) -> int:
    """What a rank needs beside weights, cache and activations (modelled).

    The runtime, the allocator's slack, and the copy of one layer's cache that exists while mlx-lm
    grows it: it concatenates old and new, layer by layer.
    """
    slack = int(ALLOCATOR_SLACK_SHARE * (kv_cache_bytes + activation_bytes))
    return RUNTIME_BYTES + slack + kv_cache_bytes // max(layers, 1)


def node_budget(
    node: NodeMemory,
    *,
    weights_bytes: int,
    kv_cache_bytes: int,
    activation_bytes: int,
    layers: int,
) -> NodeBudget:
    """Add up one rank's memory and compare it with its machine's limit."""
    overhead = overhead_bytes(kv_cache_bytes, activation_bytes, layers)
    total = weights_bytes + kv_cache_bytes + activation_bytes + overhead
    return NodeBudget(
        name=node.name,
        memory_bytes=node.memory_bytes,
        limit_bytes=node.limit_bytes,
        weights_bytes=weights_bytes,
        kv_cache_bytes=kv_cache_bytes,
        activation_bytes=activation_bytes,
        overhead_bytes=overhead,
        total_bytes=total,
        headroom_bytes=node.limit_bytes - total,
        backend=node.backend,
        limit_source=node.limit_source,
    )
