"""Placements with their ledgers and speeds, each with a prefill chunk that fits.

Everything is taken from traced profiles; nothing here traces a placement, so that thousands can
be looked at. ``planner`` traces the one that is chosen.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import permutations
from typing import Any

from k2cli.choices import Strategy
from k2cli.errors import UsageError
from k2cli.planning.hardware.machine import NodeMemory
from k2cli.planning.memory.decode import decode_demand
from k2cli.planning.memory.ledger import communication_bytes, node_budget
from k2cli.planning.memory.prefill import activation_demand
from k2cli.planning.model import ITEM_BYTES
from k2cli.planning.plan import NodeBudget
from k2cli.planning.request import Demand
from k2cli.planning.search.split import best_split
from k2cli.planning.search.stages import StageBytes, stage_bytes, stage_seconds, stage_totals
from k2cli.planning.search.traced_model import Slices, TracedModel
from k2cli.planning.speed.estimate import SpeedEstimate, predict_speed
from k2cli.sharding.placement import Placement, RankPlacement

GOOD_CHUNK_TOKENS = 512
"""A prefill chunk that keeps a GPU busy; a strategy that allows less is second choice."""

MOST_ORDERS = 24
"""Orders of unlike nodes that are all tried; of more, only those with different ends."""

EXCHANGE_PROMPT_TOKENS, EXCHANGE_ANSWER_TOKENS = 2000, 500
"""The exchange by which placements are compared: a prompt and an answer of everyday lengths."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A placement with its ledger; ``nodes`` and ``budgets`` are in rank order."""

    placement: Placement
    nodes: tuple[NodeMemory, ...]
    chunk_tokens: int
    budgets: tuple[NodeBudget, ...]
    speed: SpeedEstimate | None
    concurrency: int

    @property
    def headroom_bytes(self) -> int:
        """On the tightest node."""
        return min(budget.headroom_bytes for budget in self.budgets)

    @property
    def fits(self) -> bool:
        """Whether no node is over its limit."""
        return self.headroom_bytes >= 0

    @property
    def exchange_seconds(self) -> float | None:
        """What everyday exchanges are expected to take, one with each sequence, all at a time.

        Prompts are computed one after the other; None if no speed is predicted.
        """
        if self.speed is None:
            return None
        prefill = self.speed.prefill_tokens_per_second.expected
        together = self.speed.aggregate_decode_tokens_per_second.expected
        one = EXCHANGE_PROMPT_TOKENS / prefill + EXCHANGE_ANSWER_TOKENS / together
        return self.concurrency * one


def preference(of: Candidate) -> tuple[bool, int, float, int]:
    """Fits first; then a good prefill chunk; then speed; then room. Of equals the first wins."""
    chunk = min(of.chunk_tokens, GOOD_CHUNK_TOKENS)
    seconds = of.exchange_seconds
    room = 0 if of.fits else of.headroom_bytes
    return of.fits, chunk, 0.0 if seconds is None else -seconds, room


@dataclass(frozen=True, slots=True)
class Ground:
    """What candidates have in common: the model, the machines (limits shared), the demand.

    Without ``timed`` no speed is predicted, and of splits that fit any will do; with
    ``unfit_speed`` a speed is also predicted of what does not fit, for the record.
    """

    model: TracedModel
    nodes: tuple[NodeMemory, ...]
    demand: Demand
    timed: bool = True
    unfit_speed: bool = True

    @property
    def could_fit(self) -> bool:
        """Whether the machines together have room for the weights, which they hold at least once.

        A quick look before anything is placed: most of what is tried for advice fails it.
        """
        whole = self.model.slices(1).profile
        needed = whole.weights_bytes(0, whole.layer_count)
        return needed <= sum(node.limit_bytes for node in self.nodes)


def candidate(ground: Ground, strategy: Strategy) -> Candidate:
    """The best candidate of a strategy.

    Raises:
        UsageError: if the strategy is impossible for this model or number of nodes.
    """
    return pipeline(ground) if strategy == "pipeline" else whole_layers(ground, strategy)


def fits_somehow(ground: Ground, strategy: Strategy) -> bool:
    """Whether a strategy fits with the smallest prefill chunk: what searches for limits ask."""
    small = replace(ground.demand, chunk_tokens=ground.demand.chunks[-1])
    return candidate(replace(ground, demand=small, timed=False), strategy).fits


# --- single and tensor --------------------------------------------------------------------------


def whole_layers(ground: Ground, strategy: Strategy) -> Candidate:
    """All layers on the one node, or a slice of each on every node; the largest chunk that fits."""
    slices = ground.model.slices(len(ground.nodes) if strategy == "tensor" else 1)
    count = slices.profile.layer_count
    ranks = tuple(
        RankPlacement(rank, node.name, (0, count)) for rank, node in enumerate(ground.nodes)
    )
    placement = Placement(strategy, ranks, slices.head)
    for chunk in ground.demand.chunks:
        budgets = _budgets(ground, slices, placement, ground.nodes, chunk)
        if all(budget.headroom_bytes >= 0 for budget in budgets):
            break
    return _finished(ground, slices, placement, ground.nodes, chunk, budgets)


# --- pipeline -----------------------------------------------------------------------------------


def pipeline(ground: Ground) -> Candidate:
    """The split, the order of nodes and the chunk whose slowest stage is fastest within memory."""
    whole = ground.model.slices(1)
    count, stages = whole.profile.layer_count, len(ground.nodes)
    if count < stages:
        raise UsageError(
            f"a pipeline needs a layer per node: the model has {count} layers, "
            f"there are {stages} nodes"
        )
    demand = ground.demand
    caches = len(whole.profile.cache_bytes(1))
    if caches != count:
        raise UsageError(
            f"a pipeline needs a cache per layer: the model has {caches} caches for {count} layers",
            "use --parallel single",
        )
    held = {
        chunk: stage_bytes(whole, demand.context_length, demand.concurrency, chunk)
        for chunk in demand.chunks
    }
    orders = node_orders(ground.nodes) if demand.free_order else [ground.nodes]
    seconds = {
        node: stage_seconds(whole, node, demand.context_length) if ground.timed else 0.0
        for node in ground.nodes
    }
    found = [
        (chunk, *best)
        for chunk in demand.chunks
        if (best := _best_order(ground, whole, held[chunk], seconds, orders, chunk)) is not None
    ]
    if not found:
        return _staged(ground, whole, *_least_over(ground, whole, held[demand.chunks[-1]], orders))
    good = [entry for entry in found if entry[0] >= GOOD_CHUNK_TOKENS] or found[:1]
    if not ground.timed:
        good = good[:1]
    # The largest chunk comes first and wins among equals.
    return max((_staged(ground, whole, *entry) for entry in good), key=preference)


_Found = tuple[tuple[NodeMemory, ...], tuple[tuple[int, int], ...]]
"""Nodes in rank order, and layer ranges with the first stage first."""


def _staged(
    ground: Ground,
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
    if ground.timed:
        ground.model.check_stages([part.layers[0] for part in ranks[:-1]])
    budgets = _budgets(ground, whole, placement, order, chunk)
    return _finished(ground, whole, placement, order, chunk, budgets)


def _best_order(
    ground: Ground,
    whole: Slices,
    held: StageBytes,
    seconds: dict[NodeMemory, Any],
    orders: Sequence[tuple[NodeMemory, ...]],
    chunk: int,
) -> _Found | None:
    """The fastest split within memory over all orders of nodes, for one prefill chunk."""
    import numpy as np

    totals = {node: _totals(ground, whole, held, node, chunk) for node in ground.nodes}
    costs = {
        node: np.where(totals[node] <= node.limit_bytes, seconds[node], np.inf)
        for node in ground.nodes
    }
    # Of equally fast splits the one that leaves every node the same room: a small share of time.
    prefer = {
        node: seconds[node] * (1 + 1e-6 * (totals[node] / max(node.limit_bytes, 1)) ** 2)
        for node in ground.nodes
    }
    return _over_orders(orders, costs, prefer)


def _least_over(
    ground: Ground, whole: Slices, held: StageBytes, orders: Sequence[tuple[NodeMemory, ...]]
) -> tuple[int, *_Found]:
    """Where nothing fits: the split that lacks least on the node that lacks most."""
    chunk = ground.demand.chunks[-1]
    over = {
        node: (_totals(ground, whole, held, node, chunk) - node.limit_bytes).astype(float)
        for node in ground.nodes
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


def _totals(ground: Ground, whole: Slices, held: StageBytes, node: NodeMemory, chunk: int) -> Any:
    # As many layers as a stage could have: what a few more hold is little.
    layers = whole.profile.layer_count
    activation = partial(_activation, ground, node, chunk, 1, layers=layers)
    return stage_totals(
        held,
        max(activation(samples=False)),
        max(activation(samples=True)),
        _communication(ground, whole, "pipeline", chunk),
    )


def node_orders(nodes: Sequence[NodeMemory]) -> list[tuple[NodeMemory, ...]]:
    """Orders of nodes that could differ, the given one first.

    Nodes that differ in their name only are the same. Of many unlike nodes only those orders are
    kept that differ in who comes first and last, who hold head and embedding.
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


# --- the ledger and speed of a placement --------------------------------------------------------


def _budgets(
    ground: Ground,
    slices: Slices,
    placement: Placement,
    nodes: Sequence[NodeMemory],
    chunk: int,
) -> tuple[NodeBudget, ...]:
    profile = slices.profile
    cache = profile.cache_bytes(ground.demand.context_length, chunk)
    communication = _communication(ground, slices, placement.strategy, chunk)
    names = [node.name for node in nodes]
    budgets = []
    for node, part in zip(nodes, placement.ranks, strict=True):
        first, past_last = part.layers
        samples = past_last == profile.layer_count
        prefill, decode = _activation(
            ground, node, chunk, slices.count, samples=samples, layers=past_last - first
        )
        budget = node_budget(
            node,
            sharers=names.count(node.name),
            layer_weights_bytes=sum(profile.layer_bytes[first:past_last]),
            edge_weights_bytes=profile.edges_bytes(first, past_last),
            kv_cache_bytes=sum(_held(cache, placement, part.layers)) * ground.demand.concurrency,
            prefill_activation_bytes=prefill,
            decode_activation_bytes=decode,
            communication=communication,
            layers=past_last - first,
        )
        budgets.append(budget)
    return tuple(budgets)


def _held(cache: tuple[int, ...], placement: Placement, layers: tuple[int, int]) -> tuple[int, ...]:
    """The cache entries of a rank: those of its layers, all of them where it has all layers."""
    return cache[slice(*layers)] if placement.strategy == "pipeline" else cache


def _activation(
    ground: Ground, node: NodeMemory, chunk: int, slices: int, *, samples: bool, layers: int
) -> tuple[int, int]:
    """Peaks of prefill and of decode on a node."""
    demand, subject = ground.demand, ground.model.subject
    itemsize = ITEM_BYTES[ground.model.dtype]
    common: dict[str, Any] = {
        "device": node.device,
        "context_length": demand.context_length,
        "concurrency": demand.concurrency,
        "itemsize": itemsize,
        "slices": slices,
        "samples": samples,
    }
    prefill = activation_demand(subject.shape, chunk_tokens=chunk, **common)
    decode = decode_demand(subject.shape, layers=layers, **common)
    return prefill.peak_bytes, decode.peak_bytes


def _communication(ground: Ground, slices: Slices, strategy: Strategy, chunk: int) -> int:
    shape, itemsize = ground.model.subject.shape, ITEM_BYTES[ground.model.dtype]
    tokens = max(min(chunk, ground.demand.context_length), ground.demand.concurrency)
    logits = shape.vocabulary * itemsize * ground.demand.concurrency
    return communication_bytes(
        strategy,
        len(ground.nodes),
        tokens,
        shape.hidden * itemsize,
        logits if slices.head == "sharded" else 0,
    )


def _finished(
    ground: Ground,
    slices: Slices,
    placement: Placement,
    nodes: Sequence[NodeMemory],
    chunk: int,
    budgets: tuple[NodeBudget, ...],
) -> Candidate:
    demand = ground.demand
    fits = all(budget.headroom_bytes >= 0 for budget in budgets)
    speed = None
    if slices.work is not None and ground.timed and (fits or ground.unfit_speed):
        speed = predict_speed(
            slices.work,
            placement,
            nodes,
            transport=demand.transport,
            context_length=demand.context_length,
            concurrency=demand.concurrency,
            chunk_tokens=min(chunk, demand.context_length),
            collective_seconds=demand.collective_seconds,
        )
    return Candidate(placement, tuple(nodes), chunk, budgets, speed, demand.concurrency)
