"""Read the plan of a launch from a file, or make it for the nodes, and check it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from k2cli.choices import Transport, WantedTransport
from k2cli.errors import DoesNotFitError, UsageError
from k2cli.launch.request import LaunchRequest
from k2cli.models.checkpoint import read_config
from k2cli.nodes.node import Node
from k2cli.planning.hardware.machine import NodeMemory
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
        "--prompt-tokens": request.prompt_tokens is not None,
        "--answer-tokens": request.answer_tokens is not None,
        "--kv-bits": request.kv_bits != 0,
    }
    for option, given in contradicting.items():
        if given:
            raise UsageError(f"{option} is decided by the plan {path}", f"leave out {option}")
    return read_plan(path)


def plan_with_transport(
    request: LaunchRequest,
    folder: Path,
    machines: Sequence[NodeMemory],
    transport: Transport,
    reason: str,
    say: Callable[[str], None] = lambda text: None,
) -> tuple[Plan, Transport, str]:
    """Make a plan for the chosen transport; return it, the transport and the reason for that.

    NCCL carries tensor parallelism alone. If ``auto`` has chosen it, and the model cannot be cut
    into slices or does not fit so, the ring is used instead, over which a pipeline is possible.

    Raises:
        UsageError: if NCCL was asked for and ranks have to share a GPU.
        K2Error: if the model cannot be planned.
    """
    may_change = transport == "nccl" and request.transport == "auto" and request.parallel == "auto"
    try:
        plan = make_launch_plan(request, folder, machines, transport, say)
    except UsageError as error:
        if not may_change:
            raise
        obstacle = error.message
    else:
        if plan.fits or not may_change:
            return plan, *transport_of_placed(request, plan, transport, reason)
        obstacle = "by tensor parallelism the model does not fit"
    plan = make_launch_plan(request, folder, machines, "ring")
    return plan, "ring", f"NCCL is for tensor parallelism only: {obstacle}"


def transport_of_placed(
    request: LaunchRequest, plan: Plan, transport: Transport, reason: str
) -> tuple[Transport, str]:
    """Return the transport and its reason, or the ring if NCCL's ranks have to share a GPU.

    Raises:
        UsageError: if NCCL was asked for.
    """
    places = [node.place for node in plan.nodes]
    shared = next((place for place in places if places.count(place) > 1), None)
    if transport != "nccl" or shared is None:
        return transport, reason
    obstacle = f"{places.count(shared)} ranks share {shared}, and NCCL needs a GPU for each"
    if request.transport != "auto":
        raise UsageError(f"--backend nccl is not possible: {obstacle}", "--backend ring")
    return "ring", obstacle


def make_launch_plan(
    request: LaunchRequest,
    folder: Path,
    machines: Sequence[NodeMemory],
    transport: Transport,
    say: Callable[[str], None] = lambda text: None,
) -> Plan:
    """Make a plan of the model whose headers are in ``folder``, for the memory of the machines.

    ``say`` receives warnings about the model's files and about what was asked for.

    There is one machine per rank, each with the GPUs that its ranks may get. The ranks check that
    they hold what the plan says, so the chosen placement is not traced here.

    Raises:
        K2Error: if the model cannot be planned.
    """
    from k2cli.planning.planner import Planner
    from k2cli.planning.request import PlanRequest
    from k2cli.planning.speed.calibrations import with_calibration
    from k2cli.planning.speed.exchange import ANSWER_TOKENS, PROMPT_TOKENS

    link: WantedTransport = "auto" if transport == "local" else transport
    planner = Planner(str(folder))
    for text in planner.model.warnings:
        say(f"warning: {text}")
    wanted = PlanRequest(
        strategy=request.parallel,
        context_length=request.context_length,
        concurrency=request.concurrency or 1,
        dtype=request.dtype,
        head=request.head,
        transport=link,
        prompt_tokens=request.prompt_tokens or PROMPT_TOKENS,
        answer_tokens=request.answer_tokens or ANSWER_TOKENS,
        joins_projections=request.joins_projections,
        kv_bits=request.kv_bits,
    )
    memory = with_calibration(planner.with_gpus(machines, wanted), link)
    if request.concurrency is None:
        wanted = planner.with_most_sequences(memory, wanted)
    if request.context_length is None:
        wanted = planner.with_longest_context(memory, wanted)
    plan = planner.plan(memory, wanted, trace_chosen=False)
    made = plan.request
    if short := wanted.shortening(made.prompt_tokens, made.answer_tokens, made.context_length):
        say(f"warning: {short}")
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
        f"{plan.model.reference} does not fit: {worst.place} needs "
        f"{format_bytes(worst.total_bytes)} and has {format_bytes(worst.limit_bytes)} "
        f"({format_bytes(-worst.headroom_bytes)} too little)",
        "a smaller --context, more nodes, a smaller quantization; or --force to try anyway",
    )
