"""The ledger of one node: its items, their sum, and the headroom. Pure arithmetic.

The same functions work on integers, for one node's budget, and on numpy arrays, for all stages that
the search considers. So the search never judges by other numbers than those that are shown.
"""

from __future__ import annotations

from k2cli.planning.hardware.machine import NodeMemory
from k2cli.planning.plan import Breakdown, NodeBudget
from k2cli.units import MB

RUNTIME_BYTES = 600 * MB
"""Assumed per rank: the rank's and the guard's Python, MLX and its compiled kernels, tokenizer and
template, the transport's buffers. Memory of the operating system is not included: the node's limit
already excludes it."""

SLACK_PERCENT = 3
"""Assumed: the share of cache and activations that the allocator keeps cached or loses to rounding.
Weights are allocated once and fit their buffers."""


def slack_bytes(kv_cache_bytes: int, activation_bytes: int) -> int:
    """Return the bytes that the allocator keeps beside those in use."""
    return (kv_cache_bytes + activation_bytes) * SLACK_PERCENT // 100


def overhead_bytes(
    kv_cache_bytes: int,
    activation_bytes: int,
    largest_cache_bytes: int,
    communication_bytes: int,
) -> int:
    """Return the bytes of a rank beside weights, cache and activations (modelled).

    They are the runtime, send and receive buffers, the allocator's slack, and cache growth.
    """
    slack = slack_bytes(kv_cache_bytes, activation_bytes)
    growth = growth_bytes(largest_cache_bytes, activation_bytes)
    return RUNTIME_BYTES + communication_bytes + slack + growth


def growth_bytes(largest_cache_bytes: int, activation_bytes: int) -> int:
    """Return the bytes by which copying one layer's cache exceeds a step's activations.

    A cache that grows exists twice for a moment, layer by layer, before a step and so without its
    activations (``rank.kv_cache.table.make_room``). Of a model with recurrent layers or windows few
    caches grow far, so the largest counts and not the mean.
    """
    beyond = largest_cache_bytes - activation_bytes
    return (beyond + abs(beyond)) // 2  # its positive part, of arrays too


def communication_bytes(
    strategy: str, ranks: int, chunk_tokens: int, hidden_bytes: int, logits_bytes: int
) -> int:
    """Return the peak of buffers for messages between ranks (modelled).

    A pipeline has as many chunks of hidden states in flight as stages, each in the sender's and in
    the receiver's buffer. A tensor slice sums its hidden states into a second array, and keeps the
    gathered logits of a sampled row beside its own.
    """
    if ranks == 1:
        return 0
    if strategy == "pipeline":
        return 2 * ranks * chunk_tokens * hidden_bytes
    return 2 * chunk_tokens * hidden_bytes + logits_bytes


def node_budget(
    node: NodeMemory,
    *,
    sharers: int,
    layer_weights_bytes: int,
    edge_weights_bytes: int,
    kv_cache_bytes: int,
    prefill_activation_bytes: int,
    decode_activation_bytes: int,
    communication: int,
    largest_cache_bytes: int,
) -> NodeBudget:
    """Add up one rank's memory and compare it with its machine's limit.

    Args:
        node: its limit already divided among the ranks of its machine, or of its GPU.
        sharers: ranks on that machine or GPU.
        edge_weights_bytes: embedding, norm and head as far as this rank holds them.
        largest_cache_bytes: the largest cache of a layer, of all sequences together.
    """
    activation = max(prefill_activation_bytes, decode_activation_bytes)
    breakdown = Breakdown(
        layer_weights_bytes=layer_weights_bytes,
        edge_weights_bytes=edge_weights_bytes,
        prefill_activation_bytes=prefill_activation_bytes,
        decode_activation_bytes=decode_activation_bytes,
        communication_bytes=communication,
        runtime_bytes=RUNTIME_BYTES,
        allocator_slack_bytes=slack_bytes(kv_cache_bytes, activation),
        cache_growth_bytes=growth_bytes(largest_cache_bytes, activation),
        os_reserve_bytes=max(node.memory_bytes // sharers - node.limit_bytes, 0),
    )
    overhead = overhead_bytes(kv_cache_bytes, activation, largest_cache_bytes, communication)
    return _budget(node, kv_cache_bytes, activation, overhead, breakdown)


def _budget(
    node: NodeMemory, cache_bytes: int, activation: int, overhead: int, breakdown: Breakdown
) -> NodeBudget:
    """Add up the ledger and compare it with the node's limit."""
    weights = breakdown.layer_weights_bytes + breakdown.edge_weights_bytes
    total = weights + cache_bytes + activation + overhead
    return NodeBudget(
        name=node.name,
        memory_bytes=node.memory_bytes,
        limit_bytes=node.limit_bytes,
        weights_bytes=weights,
        kv_cache_bytes=cache_bytes,
        activation_bytes=activation,
        overhead_bytes=overhead,
        total_bytes=total,
        headroom_bytes=node.limit_bytes - total,
        backend=node.device,
        limit_source=node.limit_source,
        breakdown=breakdown,
        gpu=node.gpu,
    )
