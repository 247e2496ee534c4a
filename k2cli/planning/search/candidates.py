"""Candidates of the search: placements with their ledgers and predicted speeds.

Everything is computed from traced profiles; nothing here traces a placement, so that the search
can look at thousands. ``planner`` traces the one that is chosen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from k2cli.choices import MOST_VERIFIED_TOKENS, Strategy
from k2cli.planning.hardware.machine import NodeMemory
from k2cli.planning.memory.decode import decode_activation
from k2cli.planning.memory.ledger import communication_bytes, node_budget
from k2cli.planning.memory.prefill import PREFILL_CHUNKS, prefill_activation
from k2cli.planning.memory.quantized_kv import quantized_decode_bytes, quantized_prefill_bytes
from k2cli.planning.model import ITEM_BYTES
from k2cli.planning.plan import NodeBudget
from k2cli.planning.request import PlanRequest
from k2cli.planning.search.traced_model import Slices, TracedModel
from k2cli.planning.speed.estimate import SpeedEstimate, predict_speed
from k2cli.planning.speed.exchange import Exchange
from k2cli.sharding.joined_pairs import are_joined
from k2cli.sharding.kv_cache.quantized import QUANTIZED_QUERIES
from k2cli.sharding.latent_ways import BLOCK_TOKENS, LatentSettings, expansion_weight
from k2cli.sharding.placement import Placement

GOOD_CHUNK_TOKENS = 512
"""A prefill chunk that keeps a GPU busy; a strategy without memory for it is second choice."""


@dataclass(frozen=True, slots=True)
class PlanningProblem:
    """The input of the search: model, nodes with the limit of each rank, and resolved request.

    ``context_length`` counts instead of the request's, which may be None. Without ``timed`` no
    speed is predicted, and any split that fits is accepted. With ``unfit_speed`` a speed is also
    predicted for placements that do not fit, so that the plan can show it. With ``in_blocks``
    latent attention to a prompt is computed in blocks of its context.
    """

    traced: TracedModel
    nodes: tuple[NodeMemory, ...]
    request: PlanRequest
    context_length: int
    timed: bool = True
    unfit_speed: bool = True
    in_blocks: bool = False

    @property
    def latent_settings(self) -> LatentSettings:
        """The settings of latent attention, the same on all nodes."""
        weight = expansion_weight(node.device for node in self.nodes)
        return LatentSettings(weight, BLOCK_TOKENS if self.in_blocks else 0)

    @property
    def chunks(self) -> tuple[int, ...]:
        """The prefill chunks to consider, largest first."""
        if self.request.chunk_tokens is not None:
            return (self.request.chunk_tokens,)
        useful = tuple(chunk for chunk in PREFILL_CHUNKS if chunk <= self.context_length)
        return useful or PREFILL_CHUNKS[-1:]

    @property
    def exchange(self) -> Exchange:
        """The exchange by which placements are compared."""
        request = self.request
        wanted = Exchange(request.prompt_tokens, request.answer_tokens, request.concurrency)
        return wanted.within(self.context_length)

    @property
    def could_fit(self) -> bool:
        """True if the machines together have memory for one copy of the weights.

        A cheap check before anything is placed: most of what is tried for advice fails it.
        """
        whole = self.traced.slices(1).profile
        needed = whole.weights_bytes(0, whole.layer_count)
        return needed <= sum(node.limit_bytes for node in self.nodes)


@dataclass(frozen=True, slots=True)
class Candidate:
    """A placement with its ledger; ``nodes`` and ``budgets`` are in rank order.

    ``block_tokens`` are those of blocks of latent attention, 0 without.
    """

    placement: Placement
    nodes: tuple[NodeMemory, ...]
    chunk_tokens: int
    budgets: tuple[NodeBudget, ...]
    speed: SpeedEstimate | None
    exchange: Exchange
    block_tokens: int = 0

    @property
    def headroom_bytes(self) -> int:
        """The headroom of the tightest node."""
        return min(budget.headroom_bytes for budget in self.budgets)

    @property
    def fits(self) -> bool:
        return self.headroom_bytes >= 0

    @property
    def exchange_seconds(self) -> float | None:
        """Expected seconds of the exchange with every sequence; None if no speed is predicted."""
        return None if self.speed is None else self.speed.exchange_seconds


def preference(of: Candidate) -> tuple[bool, int, float, int]:
    """Return a sort key: what fits is best, then a good prefill chunk, then speed, then headroom.

    The first of several equal candidates wins.
    """
    chunk = min(of.chunk_tokens, GOOD_CHUNK_TOKENS)
    seconds = of.exchange_seconds
    headroom = 0 if of.fits else of.headroom_bytes
    return of.fits, chunk, 0.0 if seconds is None else -seconds, headroom


def node_budgets(
    problem: PlanningProblem,
    slices: Slices,
    placement: Placement,
    nodes: Sequence[NodeMemory],
    chunk: int,
) -> tuple[NodeBudget, ...]:
    """Compute the ledger of every rank of a placement."""
    profile = slices.profile
    cache = profile.cache_bytes(problem.context_length, chunk)
    communication = message_bytes(problem, slices, placement.strategy, chunk)
    places = [node.place for node in nodes]
    budgets = []
    for node, part in zip(nodes, placement.ranks, strict=True):
        first, past_last = part.layers
        samples = past_last == profile.layer_count
        prefill, decode = activation_bytes(
            problem, node, chunk, slices.count, samples=samples, layers=past_last - first
        )
        budget = node_budget(
            node,
            sharers=places.count(node.place),
            layer_weights_bytes=sum(profile.layer_bytes[first:past_last]),
            edge_weights_bytes=profile.edges_bytes(first, past_last),
            kv_cache_bytes=sum(_held(cache, placement, part.layers)) * problem.request.concurrency,
            prefill_activation_bytes=prefill,
            decode_activation_bytes=decode,
            communication=communication,
            largest_cache_bytes=max(cache) * problem.request.concurrency,
        )
        budgets.append(budget)
    return tuple(budgets)


def _held(cache: tuple[int, ...], placement: Placement, layers: tuple[int, int]) -> tuple[int, ...]:
    """Return the cache entries of a rank: of its layers in a pipeline, else all of them."""
    return cache[slice(*layers)] if placement.strategy == "pipeline" else cache


def activation_bytes(
    problem: PlanningProblem,
    node: NodeMemory,
    chunk: int,
    slices: int,
    *,
    samples: bool,
    layers: int,
) -> tuple[int, int]:
    """Return the peaks of prefill and of decode on a node.

    A step of decode may verify a draft: it computes as many tokens of one sequence, in the way of a
    chunk of a prompt, and has logits after each.
    """
    shape = problem.traced.model.shape
    itemsize = ITEM_BYTES[problem.traced.dtype]
    common: dict[str, Any] = {
        "device": node.device,
        "context_length": problem.context_length,
        "concurrency": problem.request.concurrency,
        "itemsize": itemsize,
        "slices": slices,
        "samples": samples,
        "joined": are_joined(problem.request.joins_projections, node.device),
    }
    prefill = prefill_activation(
        shape, chunk_tokens=chunk, layers=layers, settings=problem.latent_settings, **common
    )
    decode = decode_activation(shape, layers=layers, **common).peak_bytes
    verify = 0
    if shape.recurrence is None:
        verify = prefill_activation(
            shape, chunk_tokens=MOST_VERIFIED_TOKENS, layers=layers,
            settings=problem.latent_settings, **common | {"concurrency": logits_rows(problem)},
        ).peak_bytes  # fmt: skip
    layer = problem.traced.slices(slices).profile.quantized_layer
    if layer is None:
        return prefill.peak_bytes, max(decode, verify)
    sizes: dict[str, Any] = {
        name: common[name] for name in ("device", "context_length", "itemsize")
    }
    of_attention: dict[str, Any] = {"slices": slices, **sizes}
    dequantized = quantized_prefill_bytes(layer, **sizes)
    decode += quantized_decode_bytes(
        layer, shape, concurrency=problem.request.concurrency, **of_attention
    )
    # A short draft multiplies with quantized arrays, a longer one dequantizes them.
    short = quantized_decode_bytes(
        layer, shape, concurrency=1, queries=QUANTIZED_QUERIES, **of_attention
    )
    verify += max(dequantized, short)
    return prefill.peak_bytes + dequantized, max(decode, verify)


def logits_rows(problem: PlanningProblem) -> int:
    """Return the most rows of logits of a step: one per sequence, or per token of a draft."""
    return max(problem.request.concurrency, MOST_VERIFIED_TOKENS)


def message_bytes(problem: PlanningProblem, slices: Slices, strategy: Strategy, chunk: int) -> int:
    """Return the buffers of one rank for messages between ranks."""
    shape, itemsize = problem.traced.model.shape, ITEM_BYTES[problem.traced.dtype]
    tokens = max(min(chunk, problem.context_length), problem.request.concurrency)
    logits = shape.vocabulary * itemsize * logits_rows(problem)
    return communication_bytes(
        strategy,
        len(problem.nodes),
        tokens,
        shape.hidden * itemsize,
        logits if slices.head == "sharded" else 0,
    )


def make_candidate(
    problem: PlanningProblem,
    slices: Slices,
    placement: Placement,
    nodes: Sequence[NodeMemory],
    chunk: int,
    budgets: tuple[NodeBudget, ...],
) -> Candidate:
    """Add the predicted speed to a placement and its ledger, unless the problem wants none."""
    request = problem.request
    fits = all(budget.headroom_bytes >= 0 for budget in budgets)
    speed = None
    if slices.work is not None and problem.timed and (fits or problem.unfit_speed):
        speed = predict_speed(
            slices.work,
            placement,
            nodes,
            transport=request.transport,
            context_length=problem.context_length,
            concurrency=request.concurrency,
            chunk_tokens=min(chunk, problem.context_length),
            collective_seconds=request.collective_seconds,
            exchange=problem.exchange,
        )
    blocks = problem.latent_settings.block_tokens
    return Candidate(placement, tuple(nodes), chunk, budgets, speed, problem.exchange, blocks)
