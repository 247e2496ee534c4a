"""The ledger of one node: what goes in, what it adds up to, and what is left. Pure arithmetic.

The same lines work on integers, for one node's budget, and on numpy arrays of them, for all the
stages that a search considers: it so never judges by other numbers than those that are shown.
"""

from __future__ import annotations

from k2cli.planning.hardware.machine import NodeMemory
from k2cli.planning.plan import Breakdown, NodeBudget
from k2cli.units import MB

RUNTIME_BYTES = 600 * MB
"""Assumed per rank: the rank's and the guard's Python, MLX and its compiled kernels, tokenizer and
template, the back end's own buffers. What the operating system keeps is not here: the node's limit
is already without it."""

SLACK_PERCENT = 3
"""Assumed: what the allocator keeps cached or loses to rounding, of all that is not weights.
Weights are allocated once and fit their buffers."""


def slack_bytes(kv_cache_bytes: int, activation_bytes: int) -> int:
    """What the allocator keeps beside what is in use."""
    return (kv_cache_bytes + activation_bytes) * SLACK_PERCENT // 100


def overhead_bytes(
    kv_cache_bytes: int, activation_bytes: int, layers: int, communication_bytes: int
) -> int:
    """What a rank needs beside weights, cache and activations (modelled).

    The runtime, send and receive buffers, the allocator's slack, and what growing takes.
    """
    slack = slack_bytes(kv_cache_bytes, activation_bytes)
    growth = growth_bytes(kv_cache_bytes, activation_bytes, layers)
    return RUNTIME_BYTES + communication_bytes + slack + growth


def growth_bytes(kv_cache_bytes: int, activation_bytes: int, layers: int) -> int:
    """What the copy of one layer's cache, made before a step, takes beyond what steps take.

    Old and new exist together while a cache grows, layer by layer (``runtime.caches.make_room``);
    activations do not exist then.
    """
    beyond = kv_cache_bytes // layers - activation_bytes
    return (beyond + abs(beyond)) // 2  # its positive part, of arrays too


def communication_bytes(
    strategy: str, ranks: int, chunk_tokens: int, hidden_bytes: int, logits_bytes: int
) -> int:
    """Buffers of what travels between ranks, at the peak (modelled).

    A pipeline has as many chunks of hidden states on their way as it has stages, each in the
    sender's and in the receiver's buffer. A slice sums its hidden states into a second array, and
    keeps the gathered logits of a sampled row beside its own.
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
    layers: int,
) -> NodeBudget:
    """Add up one rank's memory and compare it with its machine's limit.

    Args:
        node: its limit already divided among the ranks of its machine.
        sharers: ranks on that machine.
        edge_weights_bytes: embedding, norm and head as far as this rank holds them.
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
        cache_growth_bytes=growth_bytes(kv_cache_bytes, activation, layers),
        os_reserve_bytes=max(node.memory_bytes // sharers - node.limit_bytes, 0),
    )
    overhead = overhead_bytes(kv_cache_bytes, activation, layers, communication)
    return _budget(node, kv_cache_bytes, activation, overhead, breakdown)


def _budget(
    node: NodeMemory, cache_bytes: int, activation: int, overhead: int, breakdown: Breakdown
) -> NodeBudget:
    """The sums, beside what the node has."""
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
    )
