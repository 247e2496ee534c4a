"""The planner: compares the possible placements of a model, chooses one, and gives the reason.

Weights and KV cache come from tracing and are exact; activations and overhead are modelled. The
limit is measured on the machine, or assumed. Speed is predicted as a band.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from k2cli.choices import Certainty, FloatType, Head, KvBits
from k2cli.errors import InternalError
from k2cli.models.quantization import describe_quantization
from k2cli.planning.config_check import model_context_length
from k2cli.planning.hardware.machine import NodeMemory, on_gpus, share_machines
from k2cli.planning.model import ModelToPlan, read_model
from k2cli.planning.plan import Alternative, Plan, PlannedModel, PlannedRequest
from k2cli.planning.request import PlanRequest
from k2cli.planning.search.candidates import (
    GOOD_CHUNK_TOKENS,
    Candidate,
    PlanningProblem,
    preference,
)
from k2cli.planning.search.reasons import alternatives, fits_alone, reason
from k2cli.planning.search.strategies import (
    candidate,
    compare,
    greatest,
    max_concurrency,
    max_context_length,
)
from k2cli.planning.search.traced_model import TracedModel
from k2cli.planning.speed.estimate import speed_obstacle

ROOMY_CONCURRENCY = (8, 4, 2)
"""Numbers of sequences that ``with_most_sequences`` tries, largest first."""

_SHORTEST_CONTEXT = 4096
"""The shortest context that ``with_longest_context`` chooses where the default does not fit."""

_CONTEXT_STEP = 1024
"""A context that is not the model's own is a multiple of this, which is easier to read."""

_MOST_TRACED_RANKS = 4
"""Ranks of the chosen placement that are traced once more: if there are more, the last one and the
first few, since the others differ only in which layers they hold."""


class Planner:
    """Plans one model; plans for other requests or machines reuse its traces.

    Args:
        quantize: a recipe such as ``4bit``, to plan the checkpoint that ``k2 quantize`` would make.

    Raises:
        UsageError: if the reference or the config is not valid.
        K2Error: if the model's files cannot be read.
    """

    def __init__(self, reference: str, quantize: str | None = None) -> None:
        self.model = read_model(reference, quantize)
        self.quantize = quantize
        self._traced: dict[tuple[FloatType, Head, KvBits], TracedModel] = {}

    def problem(self, nodes: Sequence[NodeMemory], request: PlanRequest) -> PlanningProblem:
        """Resolve a request into the input of the search.

        Raises:
            UsageError: if the request is not valid, with the value, or KV caches that are to be
                quantized cannot be.
        """
        request.check(nodes)
        dtype = request.resolved_dtype(self.model, nodes)
        context_length = request.resolved_context(self.model.config)
        key = dtype, request.head, request.kv_bits
        if key not in self._traced:
            traced = TracedModel(self.model, *key)
            traced.check_quantizable(context_length * request.concurrency)
            self._traced[key] = traced
        traced = self._traced[key]
        return PlanningProblem(traced, tuple(share_machines(nodes)), request, context_length)

    def with_gpus(self, nodes: Sequence[NodeMemory], request: PlanRequest) -> list[NodeMemory]:
        """Give each rank on a machine with GPUs one of them: the most GPUs with which it fits.

        A GPU without enough free memory is left out, and the ranks share the others.
        """
        groups = {node.name: len(node.gpus) for node in nodes if node.gpu is None}
        most = max(groups.values(), default=0)
        most = min(most, max((_count(nodes, name) for name in groups), default=0))
        own = on_gpus(nodes)
        limits = [node.limit_bytes for node in own if node.gpu is not None]
        # Ranks that share get a half or less: that is more than a GPU of their own only if this
        # has less than half of what another one has.
        if most < 2 or 2 * min(limits, default=0) >= max(limits, default=0):
            return own
        for count in range(most, 0, -1):
            placed = on_gpus(nodes, count)
            if self.plan(placed, request, limits=False).fits:
                return placed
        return own

    def with_most_sequences(self, nodes: Sequence[NodeMemory], request: PlanRequest) -> PlanRequest:
        """Raise the concurrency of a request from 1 to as many sequences as fit, up to 8.

        A request to the API without a token limit may fill the whole context, so with memory for
        a single sequence requests would wait for each other. Neither the strategy nor the prefill
        chunk of a single sequence is given up for it.
        """
        alone = self.plan(nodes, request, limits=False)
        for concurrency in ROOMY_CONCURRENCY if alone.fits else ():
            more = replace(request, concurrency=concurrency)
            plan = self.plan(nodes, more, limits=False)
            same_chunk = plan.request.prefill_chunk_tokens >= alone.request.prefill_chunk_tokens
            if plan.fits and same_chunk and plan.placement.strategy == alone.placement.strategy:
                return more
        return request

    def with_longest_context(
        self, nodes: Sequence[NodeMemory], request: PlanRequest
    ) -> PlanRequest:
        """Set the context of a request to the longest that fits, up to the model's own.

        Neither the prefill chunk that keeps a GPU busy nor the request's concurrency is given up
        for it. Agents need a long context, and a part that is not used takes no memory. It is
        shorter than planning's default if only that fits.
        """
        most = model_context_length(self.model.config)
        plan = self.plan(nodes, request, limits=False)
        shortest = plan.request.context_length if plan.fits else _SHORTEST_CONTEXT
        if most is None or most <= shortest:
            return request
        chunk = min(plan.request.prefill_chunk_tokens, GOOD_CHUNK_TOKENS)

        def keeps_all(steps: int) -> bool:
            longer = replace(request, context_length=min(shortest + steps * _CONTEXT_STEP, most))
            tried = self.plan(nodes, longer, limits=False)
            return tried.fits and tried.request.prefill_chunk_tokens >= chunk

        steps = greatest(keeps_all, -(-(most - shortest) // _CONTEXT_STEP))
        if steps == 0 and (plan.fits or not keeps_all(0)):
            return request
        return replace(request, context_length=min(shortest + steps * _CONTEXT_STEP, most))

    def plan(
        self,
        nodes: Sequence[NodeMemory],
        request: PlanRequest,
        *,
        limits: bool = True,
        trace_chosen: bool = True,
    ) -> Plan:
        """Make a plan; one that does not fit is returned too, with ``fits`` false.

        Args:
            nodes: one per rank, rank 0 first unless ``request.free_order``. Nodes of one name are
                ranks on one machine and share its limit.
            limits: also find the longest context and the most sequences, trace the chosen
                placement rank by rank, and predict a speed even if it does not fit. Needed for the
                plan that is shown, not for those that are only tried.
            trace_chosen: False omits the tracing rank by rank, for a launch: its ranks compare
                what they load with the plan.

        Raises:
            UsageError: if the request is not valid, or the wanted strategy is impossible, with
                the numbers.
        """
        problem = replace(self.problem(nodes, request), unfit_speed=limits)
        found, obstacles = compare(problem, request.strategies(len(nodes)))
        chosen = max(found, key=preference)
        if limits and trace_chosen:
            check_traced(problem, chosen)
        compared = alternatives(chosen, found, obstacles)
        if limits and request.strategy == "auto":
            compared += _alone(problem)
        plan = self._plan(problem, chosen, compared, asked=request.strategy != "auto")
        if not limits:
            return plan
        possible = [each.placement.strategy for each in found]
        return replace(
            plan,
            max_context_length=max_context_length(problem, possible),
            max_concurrency=max_concurrency(problem, possible),
        )

    def _plan(
        self,
        problem: PlanningProblem,
        chosen: Candidate,
        compared: tuple[Alternative, ...],
        *,
        asked: bool,
    ) -> Plan:
        model, request = self.model, problem.request
        note = "" if chosen.speed is not None else speed_obstacle(chosen.nodes)
        return Plan(
            model=PlannedModel(
                reference=model.reference,
                parameters=model.facts.parameter_count,
                stored_bytes=model.stored_bytes,
                architecture=str(model.config["model_type"]),
                quantization=describe_quantization(model.config),
                quantize=self.quantize or "",
                context_length=model_context_length(model.config) or 0,
            ),
            request=PlannedRequest(
                problem.context_length,
                request.concurrency,
                problem.traced.dtype,
                chosen.chunk_tokens,
                chosen.exchange.prompt_tokens,
                chosen.exchange.answer_tokens,
                chosen.block_tokens,
                request.kv_bits,
            ),
            placement=chosen.placement,
            nodes=chosen.budgets,
            fits=chosen.fits,
            speed=chosen.speed,
            speed_note=note or "",
            marks=_marks(model, chosen),
            alternatives=compared,
            reason="asked for" if asked and len(problem.nodes) > 1 else reason(compared),
        )


def _count(nodes: Sequence[NodeMemory], name: str) -> int:
    return sum(node.name == name for node in nodes)


def _alone(problem: PlanningProblem) -> tuple[Alternative, ...]:
    """Return the largest of several machines as an alternative, if the model fits on it alone.

    It is not chosen, since more machines were named, but a buyer should know.
    """
    names = {node.name for node in problem.nodes}
    if len(problem.nodes) == 1 or len(names) < len(problem.nodes):
        return ()
    largest = max(problem.nodes, key=lambda node: node.limit_bytes)
    single = candidate(replace(problem, nodes=(largest,)), "single")
    return (fits_alone(single),) if single.fits else ()


def check_traced(problem: PlanningProblem, chosen: Candidate) -> None:
    """Cut the model for its ranks as loading does, and compare their bytes with the plan.

    Raises:
        UsageError: if the model cannot be cut like this.
        InternalError: if a rank would hold other bytes than were planned.
    """
    from k2cli.sharding.trace import running_model, trace_rank
    from k2cli.sharding.weights_and_cache import kv_cache_bytes, weights_bytes

    model = problem.traced.model
    ranks = range(chosen.placement.size)
    # Rank 0 of tensor slices has been traced already: another rank has to hold as much.
    checked = ranks[-1:] if chosen.placement.strategy == "tensor" else ranks
    for rank in {*checked[: _MOST_TRACED_RANKS - 1], checked[-1]}:
        stage = trace_rank(
            model.config, chosen.placement, rank, stored=model.stored, dtype=problem.traced.dtype
        )
        stage.kv_bits = problem.request.kv_bits
        with running_model(model.config, "run as planned"):
            cache = kv_cache_bytes(stage, problem.context_length, chosen.chunk_tokens)
        held = weights_bytes(stage), cache * problem.request.concurrency
        budget = chosen.budgets[rank]
        if held != (budget.weights_bytes, budget.kv_cache_bytes):
            raise InternalError(
                f"rank {rank} of {model.config['model_type']} holds {held} bytes of weights and "
                f"cache, but the plan says {budget.weights_bytes}, {budget.kv_cache_bytes}"
            )


def _marks(model: ModelToPlan, chosen: Candidate) -> dict[str, Certainty]:
    uncertain = [node.limit_mark for node in chosen.nodes if node.limit_mark != "exact"]
    limit = uncertain[0] if uncertain else "exact"
    marks: dict[str, Certainty] = {
        "parameters": "exact",
        "stored_bytes": model.stored_mark,
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
