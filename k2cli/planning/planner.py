"""Makes a plan: chooses where the model goes, and says why.

Weights and KV cache come from tracing and are exact; activation and overhead are modelled; the
limit is what the hardware says, or is assumed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from k2cli.errors import UsageError
from k2cli.planning.candidates import Candidate, pipeline, preference, single, tensor
from k2cli.planning.hardware import NodeMemory, share_machines
from k2cli.planning.marks import Mark
from k2cli.planning.plan import Plan, PlannedModel, PlannedRequest
from k2cli.planning.stored import describe_quantization
from k2cli.planning.subject import (
    Demand,
    Subject,
    choose_context,
    choose_dtype,
    read_subject,
)

MAX_CONCURRENCY = 4096

_STRATEGIES = ("auto", "single", "pipeline", "tensor")
_HEADS = ("auto", "replicated", "sharded")
_DTYPES = ("auto", "float32", "bfloat16", "float16")

WantedStrategy = Literal["auto", "single", "pipeline", "tensor"]


def make_plan(
    model: str,
    nodes: Sequence[NodeMemory],
    *,
    strategy: WantedStrategy | str = "auto",
    context_length: int | None = None,
    concurrency: int = 1,
    dtype: str = "auto",
    head: str = "auto",
) -> Plan:
    """Plan a model on nodes; a plan that does not fit is returned too, with ``fits`` false.

    Args:
        model: a model reference. A folder with only a ``config.json`` is enough.
        nodes: one per rank, rank 0 first. Nodes of one name are ranks on one machine and share
            its limit.
        strategy: ``auto`` chooses by what is possible and fits, and says why in ``plan.reason``.
        context_length: tokens per sequence; the model's maximum or 32,768 if None, whichever is
            less.
        concurrency: sequences that are held at a time.
        dtype: ``auto`` is the checkpoint's float type, and float32 where a node computes on CPU.
        head: ``auto`` cuts the head too in tensor parallelism, where it can be cut.

    Raises:
        UsageError: for a request or config that makes no sense, with the value; where the wanted
            strategy is impossible, with the numbers.
        K2Error: if the model's files cannot be read.
    """
    _check_request(nodes, strategy, concurrency, dtype, head)
    subject = read_subject(model)
    demand = Demand(
        choose_context(context_length, subject.config),
        concurrency,
        choose_dtype(dtype, subject, nodes),
        head,
    )
    shared = share_machines(nodes)
    chosen, reason = _choose(subject, shared, demand, strategy)
    request = PlannedRequest(demand.context_length, concurrency, demand.dtype, chosen.chunk_tokens)
    return Plan(
        model=PlannedModel(
            reference=model,
            parameters=subject.facts.parameter_count,
            stored_bytes=subject.stored_bytes,
            architecture=str(subject.config["model_type"]),
            quantization=describe_quantization(subject.config),
        ),
        request=request,
        placement=chosen.placement,
        nodes=chosen.budgets,
        fits=chosen.fits,
        marks=_marks(subject, shared),
        reason=reason,
    )


ROOMY_CONCURRENCY = (8, 4, 2)
"""Sequences that a launch makes room for if nobody says how many, as far as they fit."""


def make_roomy_plan(
    model: str,
    nodes: Sequence[NodeMemory],
    *,
    strategy: WantedStrategy | str = "auto",
    context_length: int | None = None,
    dtype: str = "auto",
    head: str = "auto",
) -> Plan:
    """``make_plan`` for as many sequences as fit, up to 8, without a smaller prefill chunk.

    A request without a token limit may come to fill the whole context, so with room for a single
    sequence, requests would have to wait for each other.
    """

    def plan_for(concurrency: int) -> Plan:
        return make_plan(
            model,
            nodes,
            strategy=strategy,
            context_length=context_length,
            concurrency=concurrency,
            dtype=dtype,
            head=head,
        )

    alone = plan_for(1)
    if not alone.fits:
        return alone
    for concurrency in ROOMY_CONCURRENCY:
        plan = plan_for(concurrency)
        same_chunk = plan.request.prefill_chunk_tokens >= alone.request.prefill_chunk_tokens
        if plan.fits and same_chunk and plan.placement == alone.placement:
            return plan
    return alone


def _check_request(
    nodes: Sequence[NodeMemory], strategy: str, concurrency: int, dtype: str, head: str
) -> None:
    if not nodes:
        raise UsageError("a plan needs at least one node", "--hardware '2x m3-ultra-512'")
    choices = (
        ("parallel", strategy, _STRATEGIES),
        ("dtype", dtype, _DTYPES),
        ("head", head, _HEADS),
    )
    for name, value, allowed in choices:
        if value not in allowed:
            raise UsageError(f"--{name} '{value}' is none of {', '.join(allowed)}")
    if strategy == "single" and len(nodes) > 1:
        raise UsageError(
            f"--parallel single runs on one node, not on {len(nodes)}", "name one node only"
        )
    if not 1 <= concurrency <= MAX_CONCURRENCY:
        raise UsageError(f"concurrency must be between 1 and {MAX_CONCURRENCY}, not {concurrency}")


def _marks(subject: Subject, nodes: Sequence[NodeMemory]) -> dict[str, Mark]:
    uncertain = [node.limit_mark for node in nodes if node.limit_mark != "exact"]
    return {
        "parameters": "exact",
        "stored_bytes": subject.stored_mark,
        "weights_bytes": "exact",
        "kv_cache_bytes": "exact",
        "activation_bytes": "modelled",
        "overhead_bytes": "assumed",
        "memory_bytes": "exact",
        "limit_bytes": uncertain[0] if uncertain else "exact",
    }


# --- choosing a strategy ------------------------------------------------------------------------


def _choose(
    subject: Subject, nodes: Sequence[NodeMemory], demand: Demand, strategy: str
) -> tuple[Candidate, str]:
    if len(nodes) == 1:
        return single(subject, nodes, demand), "there is one node"
    if strategy == "pipeline":
        return pipeline(subject, nodes, demand), "asked for"
    if strategy == "tensor":
        _refuse_tensor(subject, len(nodes))
        return tensor(subject, nodes, demand), "asked for"
    obstacles: list[str] = []
    candidates: list[Candidate] = []
    for attempt in (pipeline, tensor):
        try:
            if attempt is tensor:
                _refuse_tensor(subject, len(nodes))
            candidates.append(attempt(subject, nodes, demand))
        except UsageError as error:
            obstacles.append(error.message)
    if not candidates:
        raise UsageError("; ".join(obstacles))
    chosen = max(candidates, key=preference)
    return chosen, _explain(chosen, candidates, obstacles)


def _explain(chosen: Candidate, candidates: Sequence[Candidate], obstacles: Sequence[str]) -> str:
    name = chosen.placement.strategy
    if obstacles:
        return obstacles[0]
    (other,) = (each for each in candidates if each is not chosen)
    rival = other.placement.strategy
    if not chosen.fits:
        return f"neither fits; {name} lacks least"
    if not other.fits:
        return f"{rival} does not fit"
    if preference(other)[1] < preference(chosen)[1]:
        return (
            f"it has room for prefill chunks of {chosen.chunk_tokens} tokens, "
            f"{rival} for {other.chunk_tokens}"
        )
    return "a pipeline exchanges least between nodes"


def _refuse_tensor(subject: Subject, ranks: int) -> None:
    from k2cli.sharding.footprint import tensor_obstacle

    obstacle = tensor_obstacle(subject.config, ranks)
    if obstacle is not None:
        raise UsageError(f"tensor parallelism is not possible: {obstacle}", "--parallel pipeline")
