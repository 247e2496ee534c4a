"""Memory and speed against context on given machines, for ``--plot`` and ``--svg``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from k2cli.errors import K2Error
from k2cli.planning.config_check import model_context_length
from k2cli.planning.hardware.machine import NodeMemory
from k2cli.planning.plan import NodeBudget, Plan
from k2cli.planning.planner import Planner
from k2cli.planning.request import PlanRequest
from k2cli.planning.speed.estimate import Band

SHORTEST_CONTEXT = 1024


@dataclass(frozen=True, slots=True)
class CurvePoint:
    """A plan at one context: the ledger of its tightest node, and the predicted speed."""

    context_length: int
    budget: NodeBudget
    prefill_chunk_tokens: int
    fits: bool
    decode_tokens_per_second: Band | None
    prefill_tokens_per_second: Band | None


def context_curve(
    planner: Planner, nodes: Sequence[NodeMemory], request: PlanRequest, plan: Plan
) -> tuple[CurvePoint, ...]:
    """Plan at every power of two up to the model's maximum, and at the requested context.

    The strategy is that of ``plan``; each point has its own prefill chunk.
    """
    strategy = plan.placement.strategy
    most = model_context_length(planner.model.config) or plan.request.context_length
    contexts = {plan.request.context_length, most}
    context = min(SHORTEST_CONTEXT, most)
    while context < most:
        contexts.add(context)
        context *= 2
    points = []
    for length in sorted(contexts):
        try:
            at = planner.plan(
                nodes, replace(request, context_length=length, strategy=strategy), limits=False
            )
        except K2Error:
            continue
        points.append(_point(at))
    return tuple(points)


def _point(plan: Plan) -> CurvePoint:
    speed = plan.speed
    return CurvePoint(
        plan.request.context_length,
        min(plan.nodes, key=lambda node: node.headroom_bytes),
        plan.request.prefill_chunk_tokens,
        plan.fits,
        None if speed is None else speed.decode_tokens_per_second,
        None if speed is None else speed.prefill_tokens_per_second,
    )
