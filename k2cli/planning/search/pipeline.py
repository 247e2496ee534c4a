"""The best pipeline: order of nodes, prefill chunk, and split into stages.

The memory and the time of every stage that a node could hold are computed as matrices:
``[first, past_last]`` is the stage with layers ``[first, past_last)``, and with the embedding, or
norm and head, if it has the first or the last layer. ``stage_times`` then finds the split with the
fastest exchange among those that fit. The arithmetic is that of ``memory/ledger.py`` and
``speed/placement_time.py``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate, permutations
from typing import Any

from k2cli.errors import UsageError
from k2cli.planning.hardware.machine import NodeMemory
from k2cli.planning.memory.ledger import overhead_bytes
from k2cli.planning.search.best_split import best_split
from k2cli.planning.search.candidates import (
    GOOD_CHUNK_TOKENS,
    Candidate,
    PlanningProblem,
    activation_bytes,
    make_candidate,
    message_bytes,
    node_budgets,
    preference,
)
from k2cli.planning.search.stage_times import (
    STABLE_SHARE,
    Timing,
    fastest_split,
    stage_seconds,
)
from k2cli.planning.search.traced_model import Slices
from k2cli.planning.speed.estimate import link_rates, speed_obstacle
from k2cli.sharding.placement import Placement, RankPlacement

MOST_ORDERS = 24
"""The most orders of nodes that are tried."""

_CHUNK_SHARE = 0.1
"""Gain for which a smaller prefill chunk is taken: more layers may fit the faster node with it."""

_MOST_BYTES = 2**58
"""More than any machine has, and small enough for sums to stay within 64 bits: a config may
describe a larger model. Budgets use Python's integers, so such a model still does not fit."""


def pipeline(problem: PlanningProblem) -> Candidate:
    """Find the split, order of nodes and chunk that fit and with which an exchange is fastest.

    Raises:
        UsageError: if the model cannot be cut into so many stages.
    """
    whole = problem.traced.slices(1)
    count, stages = whole.profile.layer_count, len(problem.nodes)
    if count < stages:
        raise UsageError(
            f"a pipeline needs a layer per node: the model has {count} layers, "
            f"there are {stages} nodes"
        )
    request = problem.request
    caches = len(whole.profile.cache_bytes(1))
    if caches != count:
        raise UsageError(
            f"a pipeline needs a cache per layer: the model has {caches} caches for {count} layers",
            "--parallel single",
        )
    held = {
        chunk: stage_bytes(whole, problem.context_length, request.concurrency, chunk)
        for chunk in problem.chunks
    }
    orders = node_orders(problem.nodes) if request.free_order else [problem.nodes]
    best_order = _best_order if problem.timed else _any_order
    found = [
        (chunk, *best)
        for chunk in problem.chunks
        if (best := best_order(problem, whole, held[chunk], orders, chunk)) is not None
    ]
    if not found:
        return _staged(
            problem, whole, *_least_over(problem, whole, held[problem.chunks[-1]], orders)
        )
    good = [entry for entry in found if entry[0] >= GOOD_CHUNK_TOKENS] or found[:1]
    if not problem.timed:
        good = good[:1]
    chosen, *others = (_staged(problem, whole, *entry) for entry in good)
    for other in others:  # smaller chunks
        if preference(other) > preference(chosen) and _gains(other, chosen):
            chosen = other
    return chosen


def _gains(other: Candidate, chosen: Candidate) -> bool:
    """True if a smaller chunk, which computes long prompts more slowly, gains clearly."""
    seconds, before = other.exchange_seconds, chosen.exchange_seconds
    return seconds is None or before is None or seconds < before * (1 - _CHUNK_SHARE)


_Found = tuple[tuple[NodeMemory, ...], tuple[tuple[int, int], ...]]
"""Nodes in rank order, and layer ranges with the first stage first."""


def _staged(
    problem: PlanningProblem,
    whole: Slices,
    chunk: int,
    order: tuple[NodeMemory, ...],
    ranges: tuple[tuple[int, int], ...],
) -> Candidate:
    ranks = tuple(
        RankPlacement(rank, node.name, layers)
        for rank, (node, layers) in enumerate(zip(order, reversed(ranges), strict=True))
    )
    placement = Placement("pipeline", ranks)
    if problem.timed:
        problem.traced.check_stages([part.layers[0] for part in ranks[:-1]])
    budgets = node_budgets(problem, whole, placement, order, chunk)
    return make_candidate(problem, whole, placement, order, chunk, budgets)


def _best_order(
    problem: PlanningProblem,
    whole: Slices,
    held: StageBytes,
    orders: Sequence[tuple[NodeMemory, ...]],
    chunk: int,
) -> _Found | None:
    """Find the fastest split that fits over all orders of nodes, for one prefill chunk."""
    exchange, stages = problem.exchange, len(problem.nodes)
    tokens = min(chunk, problem.context_length)
    totals = {node: _totals(problem, whole, held, node, chunk) for node in problem.nodes}
    allowed = {node: totals[node] <= node.limit_bytes for node in problem.nodes}
    # Of equally fast splits prefer the one with the most even headroom: a small share of time.
    weights = {
        node: 1 + 1e-6 * (totals[node] / max(node.limit_bytes, 1)) ** 2 for node in problem.nodes
    }
    seconds = {node: stage_seconds(whole, node, exchange, tokens, stages) for node in problem.nodes}
    hop, latency = _hops(problem, whole)
    chunks = len(exchange.chunks(tokens, stages))
    timing = Timing(exchange, chunks, stages, hop, latency)
    best: _Found | None = None
    least = math.inf
    for order in orders:
        nodes = tuple(reversed(order))
        split = fastest_split(
            [seconds[node] for node in nodes],
            [allowed[node] for node in nodes],
            [weights[node] for node in nodes],
            timing,
            least * (1 - STABLE_SHARE),
        )
        if split is not None and split[0] < least * (1 - STABLE_SHARE):
            least, ranges = split
            best = (order, ranges)
    return best


def _hops(problem: PlanningProblem, whole: Slices) -> tuple[float, float]:
    """Return the seconds of a message with the states of a group, and of an empty one."""
    if whole.work is None or speed_obstacle(problem.nodes) is not None:
        return 0.0, 0.0
    request = problem.request
    link = link_rates(problem.nodes, request.transport, "pipeline", request.collective_seconds)
    rows = problem.exchange.rows(len(problem.nodes))
    sending = rows * whole.work.hidden_bytes / link.bytes_per_second
    return link.collective_seconds + sending, link.collective_seconds


def _any_order(
    problem: PlanningProblem,
    whole: Slices,
    held: StageBytes,
    orders: Sequence[tuple[NodeMemory, ...]],
    chunk: int,
) -> _Found | None:
    """Find any split that fits, for a problem without speeds."""
    import numpy as np

    totals = {node: _totals(problem, whole, held, node, chunk) for node in problem.nodes}
    costs = {
        node: np.where(totals[node] <= node.limit_bytes, 0.0, np.inf) for node in problem.nodes
    }
    return _over_orders(orders, costs, costs)


def _least_over(
    problem: PlanningProblem,
    whole: Slices,
    held: StageBytes,
    orders: Sequence[tuple[NodeMemory, ...]],
) -> tuple[int, *_Found]:
    """Find the split with the smallest worst shortfall, for a problem without a split that fits."""
    chunk = problem.chunks[-1]
    over = {
        node: (_totals(problem, whole, held, node, chunk) - node.limit_bytes).astype(float)
        for node in problem.nodes
    }
    found = _over_orders(orders, over, {node: matrix * 0 for node, matrix in over.items()})
    assert found is not None  # every range has a finite cost, and there is a layer per node
    return chunk, *found


def _over_orders(
    orders: Sequence[tuple[NodeMemory, ...]],
    costs: dict[NodeMemory, Any],
    preferences: dict[NodeMemory, Any],
) -> _Found | None:
    best: _Found | None = None
    least = math.inf
    for order in orders:
        stages = tuple(reversed(order))
        split = best_split([costs[n] for n in stages], [preferences[n] for n in stages])
        if split is not None and split[0] < least * (1 - 1e-9):
            least, ranges = split
            best = (order, ranges)
    return best


def _totals(
    problem: PlanningProblem, whole: Slices, held: StageBytes, node: NodeMemory, chunk: int
) -> Any:
    # The most layers that a stage could have: the activations of a few more layers are small.
    layers = whole.profile.layer_count
    activation = partial(activation_bytes, problem, node, chunk, 1, layers=layers)
    return stage_totals(
        held,
        max(activation(samples=False)),
        max(activation(samples=True)),
        message_bytes(problem, whole, "pipeline", chunk),
    )


def node_orders(nodes: Sequence[NodeMemory]) -> list[tuple[NodeMemory, ...]]:
    """Return the orders of nodes that could differ, the given one first.

    Nodes that differ in their name only are the same. Of more than four nodes, only orders with
    different first and last nodes are kept, since these hold head and embedding.
    """
    kinds = {node: replace(node, name="") for node in nodes}
    orders: dict[tuple[NodeMemory, ...], tuple[NodeMemory, ...]] = {}
    if len(nodes) <= 4:  # 4! is MOST_ORDERS
        for order in permutations(nodes):
            orders.setdefault(tuple(kinds[node] for node in order), order)
        return list(orders.values())
    orders[tuple(kinds[node] for node in nodes)] = tuple(nodes)
    firsts = {kinds[node]: node for node in reversed(nodes)}
    for first in firsts.values():
        rest = list(nodes)
        rest.remove(first)
        for last in {kinds[node]: node for node in rest}.values():
            middle = list(rest)
            middle.remove(last)
            order = (first, *middle, last)
            orders.setdefault(tuple(kinds[node] for node in order), order)
    return list(orders.values())[:MOST_ORDERS]


# --- memory and time of all stages --------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class StageBytes:
    """Weights and cache of all stages, ``int64 [layers + 1, layers + 1]``, on any node.

    ``largest_cache`` is the largest cache of any layer.
    """

    weights: Any
    cache: Any
    largest_cache: int


def stage_bytes(
    whole: Slices, context_length: int, concurrency: int, chunk_tokens: int
) -> StageBytes:
    """Compute weights and cache of every stage that the whole model could be cut to."""
    profile = whole.profile
    weights = _ranges(profile.weights_before())
    weights += profile.common_bytes
    weights[0, :] += profile.embedding_bytes
    weights[:, -1] += profile.output_bytes
    weights[1:, -1] += profile.tied_bytes
    caches = [size * concurrency for size in profile.cache_bytes(context_length, chunk_tokens)]
    cache = _ranges(list(accumulate(caches, initial=0)))
    return StageBytes(weights, cache, min(max(caches), _MOST_BYTES))


def _ranges(before: list[int]) -> Any:
    """Turn sums before each position into sums of each range."""
    import numpy as np

    sums = np.array([min(size, _MOST_BYTES) for size in before], dtype=np.int64)
    return sums[None, :] - sums[:, None]


def stage_totals(
    held: StageBytes, activation_bytes: int, last_activation_bytes: int, communication: int
) -> Any:
    """Compute the total bytes of every stage; the last stage samples."""
    import numpy as np

    activation = np.full_like(held.weights, min(activation_bytes, _MOST_BYTES))
    activation[:, -1] = min(last_activation_bytes, _MOST_BYTES)
    overhead = overhead_bytes(held.cache, activation, held.largest_cache, communication)
    return held.weights + held.cache + activation + overhead
