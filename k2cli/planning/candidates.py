"""Placements with their ledgers: each is traced, and given the largest prefill chunk that fits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from k2cli.errors import UsageError
from k2cli.planning.activation import PREFILL_CHUNKS, activation_demand
from k2cli.planning.hardware import NodeMemory
from k2cli.planning.memory import RUNTIME_BYTES, node_budget
from k2cli.planning.plan import NodeBudget
from k2cli.planning.split import balanced_split
from k2cli.planning.subject import ITEM_BYTES, Demand, Subject
from k2cli.sharding.placement import (
    HeadPlacement,
    Placement,
    RankPlacement,
    Strategy,
    even_split,
)

if TYPE_CHECKING:
    from k2cli.sharding.footprint import RankFootprint

GOOD_CHUNK_TOKENS = 512
"""A prefill chunk that keeps a GPU busy; a strategy that allows less is second choice."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A placement with its ledger."""

    placement: Placement
    chunk_tokens: int
    budgets: tuple[NodeBudget, ...]

    @property
    def headroom_bytes(self) -> int:
        """On the tightest node."""
        return min(budget.headroom_bytes for budget in self.budgets)

    @property
    def fits(self) -> bool:
        """Whether no node is over its limit."""
        return self.headroom_bytes >= 0


def preference(candidate: Candidate) -> tuple[bool, int, int]:
    """Fits first; then a good prefill chunk; then room. A pipeline wins ties: it stands first."""
    chunk = min(candidate.chunk_tokens, GOOD_CHUNK_TOKENS)
    return candidate.fits, chunk, 0 if candidate.fits else candidate.headroom_bytes


def single(subject: Subject, nodes: Sequence[NodeMemory], demand: Demand) -> Candidate:
    return _whole_layers(subject, nodes, demand, "single")


def tensor(subject: Subject, nodes: Sequence[NodeMemory], demand: Demand) -> Candidate:
    return _whole_layers(subject, nodes, demand, "tensor", _head(subject, len(nodes), demand))


def _head(subject: Subject, ranks: int, demand: Demand) -> HeadPlacement:
    """Cut the head too wherever it can be: less to hold, and to read for every token."""
    from k2cli.sharding.head import can_shard_head

    if demand.head == "replicated":
        return "replicated"
    if can_shard_head(subject.facts.model, ranks):
        return "sharded"
    if demand.head == "sharded":
        raise UsageError(
            f"the head of {subject.config['model_type']} cannot be cut into {ranks} equal parts",
            "--head replicated",
        )
    return "replicated"


def _whole_layers(
    subject: Subject,
    nodes: Sequence[NodeMemory],
    demand: Demand,
    strategy: Strategy,
    head: HeadPlacement = "replicated",
) -> Candidate:
    count = subject.facts.layer_count
    ranks = tuple(RankPlacement(rank, node.name, (0, count)) for rank, node in enumerate(nodes))
    return _traced(subject, nodes, demand, Placement(strategy, ranks, head))


def pipeline(subject: Subject, nodes: Sequence[NodeMemory], demand: Demand) -> Candidate:
    """The even split, or the one that fills all stages equally if only that fits."""
    count = subject.facts.layer_count
    if count < len(nodes):
        raise UsageError(
            f"a pipeline needs a layer per node: the model has {count} layers, "
            f"there are {len(nodes)} nodes"
        )
    even = _staged(subject, nodes, demand, even_split(count, len(nodes)))
    if even.fits and even.chunk_tokens >= min(GOOD_CHUNK_TOKENS, demand.context_length):
        return even
    ranges = _balanced_ranges(subject, nodes, demand, even)
    if ranges is None or ranges == tuple(part.layers for part in even.placement.ranks):
        return even
    return max((even, _staged(subject, nodes, demand, ranges)), key=preference)


def _staged(
    subject: Subject,
    nodes: Sequence[NodeMemory],
    demand: Demand,
    ranges: Sequence[tuple[int, int]],
) -> Candidate:
    ranks = tuple(
        RankPlacement(rank, node.name, layers)
        for rank, (node, layers) in enumerate(zip(nodes, ranges, strict=True))
    )
    return _traced(subject, nodes, demand, Placement("pipeline", ranks))


def _balanced_ranges(
    subject: Subject, nodes: Sequence[NodeMemory], demand: Demand, even: Candidate
) -> tuple[tuple[int, int], ...] | None:
    from k2cli.sharding.stage import anatomy
    from k2cli.sharding.trace import parameters

    parts = anatomy(subject.facts.model)
    weights = [sum(v.nbytes for v in parameters(layer).values()) for layer in parts.layers]
    cache = sum(budget.kv_cache_bytes for budget in even.budgets) // len(weights)
    embeddings = sum(
        sum(v.nbytes for v in parameters(parent[name]).values())
        for parent, name in parts.embeddings
    )
    outputs = sum(
        sum(v.nbytes for v in parameters(parent[name]).values()) for parent, name in parts.outputs
    ) + (embeddings if parts.tied else 0)
    # Room for layers: the limit without what does not depend on where the cut is.
    smallest = _activations(subject, nodes, demand, even.placement, PREFILL_CHUNKS[-1])
    capacities = [
        node.limit_bytes - RUNTIME_BYTES - peak for node, peak in zip(nodes, smallest, strict=True)
    ]
    layer_bytes = [size + int(cache * 1.05) for size in weights]
    return balanced_split(layer_bytes, capacities, embeddings, outputs)


# --- the ledger of a placement ------------------------------------------------------------------


def _traced(
    subject: Subject, nodes: Sequence[NodeMemory], demand: Demand, placement: Placement
) -> Candidate:
    """Trace a placement and give it the largest prefill chunk that has room."""
    from k2cli.sharding.footprint import footprints

    held = footprints(
        subject.config,
        placement,
        context_length=demand.context_length,
        concurrency=demand.concurrency,
        stored=subject.stored,
        dtype=demand.dtype,
    )
    useful = [chunk for chunk in PREFILL_CHUNKS if chunk <= demand.context_length]
    for chunk in useful or PREFILL_CHUNKS[-1:]:
        candidate = _budgeted(subject, nodes, demand, placement, held, chunk)
        if candidate.fits:
            break
    return candidate


def _budgeted(
    subject: Subject,
    nodes: Sequence[NodeMemory],
    demand: Demand,
    placement: Placement,
    held: Sequence[RankFootprint],
    chunk: int,
) -> Candidate:
    peaks = _activations(subject, nodes, demand, placement, chunk)
    budgets = tuple(
        node_budget(
            node,
            weights_bytes=rank.weights_bytes,
            kv_cache_bytes=rank.kv_cache_bytes,
            activation_bytes=peak,
            layers=part.layers[1] - part.layers[0],
        )
        for node, rank, part, peak in zip(nodes, held, placement.ranks, peaks, strict=True)
    )
    return Candidate(placement, chunk, budgets)


def _activations(
    subject: Subject,
    nodes: Sequence[NodeMemory],
    demand: Demand,
    placement: Placement,
    chunk: int,
) -> list[int]:
    slices = placement.size if placement.strategy == "tensor" else 1
    return [
        activation_demand(
            subject.shape,
            backend=node.backend,
            chunk_tokens=chunk,
            context_length=demand.context_length,
            concurrency=demand.concurrency,
            itemsize=ITEM_BYTES[demand.dtype],
            slices=slices,
            samples=part.layers[1] == placement.layer_count,
        ).peak_bytes
        for node, part in zip(nodes, placement.ranks, strict=True)
    ]
