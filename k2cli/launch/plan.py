"""Read the plan of a launch from a file, or make it for the nodes, and check it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from k2cli.choices import Transport, WantedTransport
from k2cli.errors import DoesNotFitError, UsageError
from k2cli.launch.request import LaunchRequest
from k2cli.models.checkpoint import read_config
from k2cli.nodes.node import Node
from k2cli.planning.plan import NodeBudget, Plan, read_plan
from k2cli.units import format_bytes


def read_given_plan(request: LaunchRequest) -> Plan | None:
    """Read the plan file that the request names; None if it names none.

    Raises:
        UsageError: if it cannot be read, or an option contradicts it.
    """
    path = request.plan_file
    if path is None:
        return None
    contradicting = {
        "--parallel": request.parallel != "auto",
        "--dtype": request.dtype != "auto",
        "--context": request.context_length is not None,
        "--concurrency": request.concurrency is not None,
        "--head": request.head != "auto",
    }
    for option, given in contradicting.items():
        if given:
            raise UsageError(f"{option} is decided by the plan {path}", f"leave out {option}")
    return read_plan(path)


def make_launch_plan(
    request: LaunchRequest, folder: Path, nodes: Sequence[Node], transport: Transport
) -> Plan:
    """Make a plan of the model whose headers are in ``folder``, for the memory of the nodes.

    The ranks check that they hold what the plan says, so the chosen placement is not traced here.

    Raises:
        K2Error: if the model cannot be planned, or a node cannot be asked.
    """
    from k2cli.planning.planner import Planner
    from k2cli.planning.request import PlanRequest
    from k2cli.planning.speed.calibrations import with_calibration

    known = {node.name: node.memory() for node in {node.name: node for node in nodes}.values()}
    link: WantedTransport = "auto" if transport == "local" else transport
    memory = with_calibration([known[node.name] for node in nodes], link)
    planner = Planner(str(folder))
    wanted = PlanRequest(
        strategy=request.parallel,
        context_length=request.context_length,
        concurrency=request.concurrency or 1,
        dtype=request.dtype,
        head=request.head,
        transport=link,
    )
    if request.concurrency is None:
        wanted = planner.with_most_sequences(memory, wanted)
    if request.context_length is None:
        wanted = planner.with_longest_context(memory, wanted)
    plan = planner.plan(memory, wanted, trace_chosen=False)
    return replace(plan, model=replace(plan.model, reference=request.model))


def check_plan(plan: Plan, folder: Path, nodes: Sequence[Node], *, force: bool) -> None:
    """Raise an error if a plan is for other nodes or another model, or does not fit.

    Raises:
        UsageError: if it is for another number of nodes or of layers.
        DoesNotFitError: if it does not fit and ``force`` is not set.
    """
    if plan.placement.size != len(nodes):
        raise UsageError(
            f"the plan is for {plan.placement.size} rank(s), and {len(nodes)} node(s) are named"
        )
    layers = _layer_count(folder)
    if layers is not None and layers != plan.placement.layer_count:
        raise UsageError(
            f"the plan places {plan.placement.layer_count} layers, the model has {layers}",
            f"k2 plan-memory {plan.model.reference} --hardware SPEC --save plan.json",
        )
    if not plan.fits and not force:
        raise _does_not_fit(plan)


def _layer_count(folder: Path) -> int | None:
    config = read_config(folder)
    count = (config.get("text_config") or config).get("num_hidden_layers")
    return count if isinstance(count, int) else None


def _does_not_fit(plan: Plan) -> DoesNotFitError:
    worst: NodeBudget = min(plan.nodes, key=lambda node: node.headroom_bytes)
    return DoesNotFitError(
        f"{plan.model.reference} does not fit: {worst.name} needs "
        f"{format_bytes(worst.total_bytes)} and has {format_bytes(worst.limit_bytes)} "
        f"({format_bytes(-worst.headroom_bytes)} too little)",
        "a smaller --context, more nodes, a smaller quantization; or --force to try anyway",
    )
