"""Makes a plan: compares where the model could go, chooses, and says why.

Weights and KV cache come from tracing and are exact; activation and overhead are modelled; the
limit is what the hardware says, or is assumed. Speed is predicted as a band.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from k2cli.choices import (
    Certainty,
    FloatType,
    Head,
    Parallel,
    Strategy,
    WantedFloatType,
    WantedTransport,
)
from k2cli.errors import InternalError, UsageError
from k2cli.planning.config_check import model_context_length
from k2cli.planning.hardware.machine import NodeMemory, share_machines
from k2cli.planning.memory.stored import describe_quantization
from k2cli.planning.model import Subject, choose_context, choose_dtype, read_subject
from k2cli.planning.plan import Alternative, Plan, PlannedModel, PlannedRequest
from k2cli.planning.request import Demand, check_amounts, check_nodes
from k2cli.planning.search.candidates import Candidate, Ground, candidate, preference
from k2cli.planning.search.limits import max_concurrency, max_context_length
from k2cli.planning.search.reasons import alternatives, fits_alone, reason
from k2cli.planning.search.traced_model import TracedModel
from k2cli.planning.speed.estimate import speed_obstacle

ROOMY_CONCURRENCY = (8, 4, 2)
"""Sequences that a launch makes room for if nobody says how many, as far as they fit."""

_MOST_TRACED_RANKS = 4
"""Ranks of the chosen placement that are traced once more; of more, the last one and the first few,
since the others differ only in which layers they hold."""


@dataclass(frozen=True, slots=True)
class Wishes:
    """What a user asked of a plan, as it was given; None and ``auto`` leave it to k2.

    ``context_length`` is in tokens per sequence: the model's maximum or 32,768 if None, whichever
    is less. ``dtype`` ``auto`` is the checkpoint's float type, and float32 where a node computes
    on its CPU. ``head`` ``auto`` cuts the head too in tensor parallelism, where it can be cut.
    ``transport`` and ``collective_seconds`` concern the predicted speed.
    """

    strategy: Parallel = "auto"
    context_length: int | None = None
    concurrency: int = 1
    dtype: WantedFloatType = "auto"
    head: Head = "auto"
    chunk_tokens: int | None = None
    transport: WantedTransport = "auto"
    collective_seconds: float | None = None
    free_order: bool = False


class Planner:
    """Plans one model; asked again, with other wishes or machines, it reuses what it has traced.

    Args:
        quantize: a recipe such as ``4bit``, to plan the checkpoint that ``k2 quantize`` would make.

    Raises:
        UsageError: for a reference or config that makes no sense.
        K2Error: if the model's files cannot be read.
    """

    def __init__(self, model: str, quantize: str | None = None) -> None:
        self.model = model
        self.quantize = quantize
        self.subject = read_subject(model, quantize)
        self._traced: dict[tuple[FloatType, Head], TracedModel] = {}

    def ground(self, nodes: Sequence[NodeMemory], wishes: Wishes) -> Ground:
        """What candidates start from.

        Raises:
            UsageError: for wishes that make no sense, with the value.
        """
        check_nodes(nodes, wishes.strategy)
        check_amounts(wishes.concurrency, wishes.chunk_tokens, wishes.collective_seconds)
        dtype = choose_dtype(wishes.dtype, self.subject, nodes)
        demand = Demand(
            choose_context(wishes.context_length, self.subject.config),
            wishes.concurrency,
            wishes.chunk_tokens,
            wishes.transport,
            wishes.collective_seconds,
            wishes.free_order,
        )
        return Ground(self._model(dtype, wishes.head), tuple(share_machines(nodes)), demand)

    def plan(
        self,
        nodes: Sequence[NodeMemory],
        wishes: Wishes,
        *,
        limits: bool = True,
        trace_chosen: bool = True,
    ) -> Plan:
        """Plan on nodes; a plan that does not fit is returned too, with ``fits`` false.

        Args:
            nodes: one per rank, rank 0 first unless ``wishes.free_order``. Nodes of one name are
                ranks on one machine and share its limit.
            limits: also find the longest context and the most sequences, trace the chosen
                placement rank by rank, and predict a speed even if it does not fit: for the plan
                that is shown, not for those that are tried on the way.
            trace_chosen: False leaves the tracing rank by rank to the ranks themselves, which hold
                what they are about to load against the plan.

        Raises:
            UsageError: for a request that makes no sense; where the wanted strategy is
                impossible, with the numbers.
        """
        ground = replace(self.ground(nodes, wishes), unfit_speed=limits)
        found, obstacles = _compare(ground, strategies_for(wishes.strategy, len(nodes)))
        chosen = max(found, key=preference)
        if limits and trace_chosen:
            check_traced(ground, chosen)
        compared = alternatives(chosen, found, obstacles)
        if limits and wishes.strategy == "auto":
            compared += _alone(ground)
        plan = self._plan(ground, chosen, compared, asked=wishes.strategy != "auto")
        if not limits:
            return plan
        possible = [each.placement.strategy for each in found]
        return replace(
            plan,
            max_context_length=max_context_length(ground, possible),
            max_concurrency=max_concurrency(ground, possible),
        )

    def _model(self, dtype: FloatType, head: Head) -> TracedModel:
        if (dtype, head) not in self._traced:
            self._traced[dtype, head] = TracedModel(self.subject, dtype, head)
        return self._traced[dtype, head]

    def _plan(
        self,
        ground: Ground,
        chosen: Candidate,
        compared: tuple[Alternative, ...],
        *,
        asked: bool,
    ) -> Plan:
        subject, demand = self.subject, ground.demand
        note = "" if chosen.speed is not None else speed_obstacle(chosen.nodes)
        return Plan(
            model=PlannedModel(
                reference=self.model,
                parameters=subject.facts.parameter_count,
                stored_bytes=subject.stored_bytes,
                architecture=str(subject.config["model_type"]),
                quantization=describe_quantization(subject.config),
                quantize=self.quantize or "",
                context_length=model_context_length(subject.config) or 0,
            ),
            request=PlannedRequest(
                demand.context_length, demand.concurrency, ground.model.dtype, chosen.chunk_tokens
            ),
            placement=chosen.placement,
            nodes=chosen.budgets,
            fits=chosen.fits,
            speed=chosen.speed,
            speed_note=note or "",
            marks=_marks(subject, chosen),
            alternatives=compared,
            reason="asked for" if asked and len(ground.nodes) > 1 else reason(compared),
        )


def strategies_for(wanted: Parallel, nodes: int) -> list[Strategy]:
    """The strategies to compare, the preferred of equals first."""
    if nodes == 1:
        return ["single"]
    if wanted == "pipeline":
        return ["pipeline"]
    return ["tensor"] if wanted == "tensor" else ["pipeline", "tensor"]


def _compare(
    ground: Ground, strategies: Sequence[Strategy]
) -> tuple[list[Candidate], dict[Strategy, str]]:
    """A candidate of every strategy that is possible, and what is in the way of the others."""
    found: list[Candidate] = []
    obstacles: dict[Strategy, str] = {}
    failure: UsageError | None = None
    for strategy in strategies:
        try:
            found.append(candidate(ground, strategy))
        except UsageError as error:
            obstacles[strategy], failure = error.message, failure or error
    if not found:
        assert failure is not None
        undivided = len(strategies) > 1
        raise UsageError(
            "; ".join(dict.fromkeys(obstacles.values())),
            "name one machine: there it need not be divided" if undivided else failure.hint,
        )
    return found, obstacles


def _alone(ground: Ground) -> tuple[Alternative, ...]:
    """The largest of several machines by itself, if it has room for everything.

    It is not chosen, since more machines were named; but who is about to buy them should know.
    """
    names = {node.name for node in ground.nodes}
    if len(ground.nodes) == 1 or len(names) < len(ground.nodes):
        return ()
    largest = max(ground.nodes, key=lambda node: node.limit_bytes)
    single = candidate(replace(ground, nodes=(largest,)), "single")
    return (fits_alone(single),) if single.fits else ()


def check_traced(ground: Ground, chosen: Candidate) -> None:
    """Cut the model as the placement says, as its ranks will, and compare what they hold.

    Raises:
        UsageError: if the model cannot be cut so.
        InternalError: if a rank would hold other bytes than were planned.
    """
    from k2cli.sharding.footprint import kv_cache_bytes, weights_bytes
    from k2cli.sharding.trace import running_model, trace_rank

    subject, demand = ground.model.subject, ground.demand
    ranks = range(chosen.placement.size)
    # What rank 0 of tensor slices holds was traced to begin with: another one has to hold as much.
    checked = ranks[-1:] if chosen.placement.strategy == "tensor" else ranks
    for rank in {*checked[: _MOST_TRACED_RANKS - 1], checked[-1]}:
        stage = trace_rank(
            subject.config, chosen.placement, rank, stored=subject.stored, dtype=ground.model.dtype
        )
        with running_model(subject.config, "run as planned"):
            cache = kv_cache_bytes(stage, demand.context_length, chosen.chunk_tokens)
        held = weights_bytes(stage), cache * demand.concurrency
        budget = chosen.budgets[rank]
        if held != (budget.weights_bytes, budget.kv_cache_bytes):
            raise InternalError(
                f"rank {rank} of {subject.config['model_type']} holds {held} bytes of weights and "
                f"cache, planned were {budget.weights_bytes}, {budget.kv_cache_bytes}"
            )


def _marks(subject: Subject, chosen: Candidate) -> dict[str, Certainty]:
    uncertain = [node.limit_mark for node in chosen.nodes if node.limit_mark != "exact"]
    limit = uncertain[0] if uncertain else "exact"
    marks: dict[str, Certainty] = {
        "parameters": "exact",
        "stored_bytes": subject.stored_mark,
        "weights_bytes": "exact",
        "kv_cache_bytes": "exact",
        "activation_bytes": "modelled",
        "prefill_activation_bytes": "modelled",
        "decode_activation_bytes": "modelled",
        "communication_bytes": "modelled",
        "runtime_bytes": "assumed",
        "allocator_slack_bytes": "assumed",
        "cache_growth_bytes": "modelled",
        "overhead_bytes": "assumed",
        "os_reserve_bytes": limit,
        "memory_bytes": "exact",
        "limit_bytes": limit,
        "max_context_length": "modelled",
        "max_concurrency": "modelled",
    }
    if chosen.speed is not None:
        marks["speed"] = "modelled"
    return marks


def make_plan(
    model: str,
    nodes: Sequence[NodeMemory],
    *,
    strategy: Parallel = "auto",
    context_length: int | None = None,
    concurrency: int = 1,
    dtype: WantedFloatType = "auto",
    head: Head = "auto",
    transport: WantedTransport = "auto",
    trace_chosen: bool = True,
) -> Plan:
    """Plan a model on nodes, the first of which leads; see ``Planner.plan`` and ``Wishes``.

    Raises:
        UsageError: for a request or config that makes no sense, with the value; where the wanted
            strategy is impossible, with the numbers.
        K2Error: if the model's files cannot be read.
    """
    wishes = Wishes(strategy, context_length, concurrency, dtype, head, transport=transport)
    return Planner(model).plan(nodes, wishes, trace_chosen=trace_chosen)


def make_roomy_plan(
    model: str,
    nodes: Sequence[NodeMemory],
    *,
    strategy: Parallel = "auto",
    context_length: int | None = None,
    dtype: WantedFloatType = "auto",
    head: Head = "auto",
    transport: WantedTransport = "auto",
    trace_chosen: bool = True,
) -> Plan:
    """``make_plan`` for as many sequences as fit, up to 8, without a smaller prefill chunk.

    A request without a token limit may come to fill the whole context, so with room for a single
    sequence, requests would have to wait for each other.
    """
    planner = Planner(model)
    wishes = Wishes(strategy, context_length, 1, dtype, head, transport=transport)
    alone = planner.plan(nodes, wishes, limits=False)
    if not alone.fits:
        return planner.plan(nodes, wishes, trace_chosen=trace_chosen)
    for concurrency in ROOMY_CONCURRENCY:
        roomy = replace(wishes, concurrency=concurrency)
        plan = planner.plan(nodes, roomy, limits=False)
        same_chunk = plan.request.prefill_chunk_tokens >= alone.request.prefill_chunk_tokens
        if plan.fits and same_chunk and plan.placement.strategy == alone.placement.strategy:
            return planner.plan(nodes, roomy, trace_chosen=trace_chosen)
    return planner.plan(nodes, wishes, trace_chosen=trace_chosen)
