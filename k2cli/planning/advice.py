"""Advice for a plan that does not fit: the smallest change of each kind that makes it fit.

Every change is planned before it is advised. Quantized KV caches are not advised: what they cost in
quality depends on the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from k2cli.errors import K2Error
from k2cli.planning.hardware.chips import chips
from k2cli.planning.hardware.machine import NodeMemory, share_machines
from k2cli.planning.hardware.spec import catalog_node, hardware_text, numbered
from k2cli.planning.model import quantize_command
from k2cli.planning.plan import Advice, Plan
from k2cli.planning.planner import Planner
from k2cli.planning.request import PlanRequest
from k2cli.planning.search.candidates import GOOD_CHUNK_TOKENS
from k2cli.planning.search.strategies import max_context_length
from k2cli.sharding.recipe import BITS, Recipe, obstacle_to_quantizing, parse_recipe
from k2cli.units import GIB, MIB, format_bytes, format_gib

SHORTEST_CONTEXT = 1024
"""The shortest context that is advised; a shorter one is of no use."""

CONTEXT_STEP = 1024
"""Advised contexts are multiples of this."""

MOST_MACHINES = 4
"""The most machines that are advised: with more, links decide and not memory."""

GOOD_BITS = 4
"""Bits of a weight below which answers become noticeably worse: k2 advises more machines before it
advises fewer bits."""

MACOS_SHARE = 0.04
MACOS_BYTES = 16 * GIB
"""Memory that a raised GPU limit must leave to macOS (assumed): this share, and at least so many
bytes. Wiring more than there is can panic the kernel (mlx-lm issue 883)."""

_RAISABLE = "sudo sysctl iogpu.wired_limit_mb={megabytes}"


def advise(
    planner: Planner, nodes: Sequence[NodeMemory], request: PlanRequest, plan: Plan
) -> tuple[Advice, ...]:
    """Return changes that would make a plan fit, the cheapest first.

    Args:
        planner: the planner that made the plan; its traces are used again.
        plan: a plan that does not fit, with its limits (``max_context_length``,
            ``max_concurrency``).
    """
    kinds: tuple[Callable[[], Advice | None], ...] = (
        lambda: _smaller_chunk(planner, nodes, request),
        lambda: _other_strategy(planner, nodes, request),
        lambda: _raised_limit(planner, nodes, request),
        lambda: _fewer_sequences(planner, nodes, request, plan),
        lambda: _shorter_context(planner, nodes, request, plan),
        lambda: _fewer_bits(planner, nodes, request),
        lambda: _larger_machines(planner, nodes, request),
        lambda: _more_machines(planner, nodes, request),
    )
    found = [advice for kind in kinds if (advice := kind()) is not None]
    if not any(advice.kind in ("machine", "node") for advice in found):
        both = _fewer_bits_on_other_machines(planner, nodes, request, found)
        found += [both] if both is not None else []
    return tuple(found)


def _fitting(planner: Planner, nodes: Sequence[NodeMemory], request: PlanRequest) -> Plan | None:
    """Return the plan, or None if it does not fit or is impossible."""
    try:
        if not planner.problem(nodes, request).could_fit:
            return None
        plan = planner.plan(nodes, request, limits=False)
    except K2Error:
        return None
    return plan if plan.fits else None


def _advice(
    kind: str, change: str, options: dict[str, str], plan: Plan | None, command: str = ""
) -> Advice | None:
    if plan is None:
        return None
    decode = plan.speed.decode_tokens_per_second.expected if plan.speed is not None else None
    headroom = min(node.headroom_bytes for node in plan.nodes)
    return Advice(kind, change, options, headroom, decode, command)


def _smaller_chunk(
    planner: Planner, nodes: Sequence[NodeMemory], request: PlanRequest
) -> Advice | None:
    if request.chunk_tokens is None:
        return None
    plan = _fitting(planner, nodes, replace(request, chunk_tokens=None))
    if plan is None:
        return None
    chunk = plan.request.prefill_chunk_tokens
    return _advice("chunk", f"prefill in chunks of {chunk} tokens", {"--chunk": str(chunk)}, plan)


def _other_strategy(
    planner: Planner, nodes: Sequence[NodeMemory], request: PlanRequest
) -> Advice | None:
    if request.strategy == "auto" or len(nodes) == 1:
        return None
    plan = _fitting(planner, nodes, replace(request, strategy="auto"))
    if plan is None:
        return None
    strategy = plan.placement.strategy
    return _advice("strategy", f"{strategy} instead", {"--parallel": strategy}, plan)


def _raised_limit(
    planner: Planner, nodes: Sequence[NodeMemory], request: PlanRequest
) -> Advice | None:
    """Advise a higher GPU limit, which a Mac keeps until it restarts."""
    if any(node.device != "metal" for node in nodes):
        return None
    most = [
        replace(node, limit_bytes=max(node.limit_bytes, raisable_limit(node.memory_bytes)))
        for node in nodes
    ]
    widest = _fitting(planner, most, request)
    if widest is None:
        return None
    needed: dict[int, int] = {}  # one limit for all Macs of the same memory size
    for node in nodes:
        total = max(budget.total_bytes for budget in widest.nodes if budget.name == node.name)
        needed[node.memory_bytes] = max(needed.get(node.memory_bytes, 0), total)
    raised = [
        replace(node, limit_bytes=max(node.limit_bytes, -(-needed[node.memory_bytes] // GIB) * GIB))
        for node in nodes
    ]
    plan = _fitting(planner, raised, request)
    changed = [new for old, new in zip(nodes, raised, strict=True) if new != old]
    if plan is None or not changed:
        return None
    limit = max(node.limit_bytes for node in changed)
    specification = hardware_text(raised)
    return _advice(
        "limit",
        f"let the GPU use {format_gib(limit)} of {format_gib(changed[0].memory_bytes)}, "
        "until the Mac restarts",
        {} if specification is None else {"--hardware": specification},
        plan,
        _RAISABLE.format(megabytes=limit // MIB),
    )


def raisable_limit(memory_bytes: int) -> int:
    """Return the highest GPU limit that leaves macOS the memory that it needs."""
    return memory_bytes - max(MACOS_BYTES, int(memory_bytes * MACOS_SHARE))


def _fewer_sequences(
    planner: Planner, nodes: Sequence[NodeMemory], request: PlanRequest, plan: Plan
) -> Advice | None:
    fewer = plan.max_concurrency
    if not 0 < fewer < request.concurrency:
        return None
    what = "one sequence" if fewer == 1 else f"{fewer} sequences"
    fitting = _fitting(planner, nodes, replace(request, concurrency=fewer))
    return _advice("concurrency", f"{what} at a time", {"--concurrency": str(fewer)}, fitting)


def _shorter_context(
    planner: Planner, nodes: Sequence[NodeMemory], request: PlanRequest, plan: Plan
) -> Advice | None:
    """Advise the longest context with a good prefill chunk, or with any chunk if there is none."""
    possible = [each.name for each in plan.alternatives if each.possible]
    strategies = [each for each in request.strategies(len(nodes)) if each in possible]
    good = replace(request, chunk_tokens=request.chunk_tokens or GOOD_CHUNK_TOKENS)
    for longest in (
        max_context_length(planner.problem(nodes, good), strategies),
        plan.max_context_length,
    ):
        context = longest // CONTEXT_STEP * CONTEXT_STEP
        if SHORTEST_CONTEXT <= context < plan.request.context_length:
            fitting = _fitting(planner, nodes, replace(request, context_length=context))
            what = f"a context of {context:,} tokens"
            return _advice("context", what, {"--context": str(context)}, fitting)
    return None


def _fewer_bits(
    planner: Planner, nodes: Sequence[NodeMemory], request: PlanRequest
) -> Advice | None:
    """Advise the most bits that fit, if k2 can quantize the model to fewer bits than it has."""
    recipe, plan = most_bits(planner, nodes, request)
    if recipe is None or plan is None:
        return None
    return _advice(
        "quantize",
        f"{recipe.bits} bits, {format_bytes(plan.model.stored_bytes)}",
        {"--quantize": str(recipe)},
        plan,
        quantize_command(planner.model.reference, recipe),
    )


def _fewer_bits_on_other_machines(
    planner: Planner, nodes: Sequence[NodeMemory], request: PlanRequest, found: Sequence[Advice]
) -> Advice | None:
    """Advise both changes together: few machines, and not too few bits.

    Returns:
        None if fewer bits alone already keep ``GOOD_BITS``, or nothing fits.
    """
    alone = [parse_recipe(each.options["--quantize"]).bits for each in found
             if each.kind == "quantize"]  # fmt: skip
    most = max(alone, default=0)
    best: Advice | None = None
    for machines in _other_machines(nodes):
        if most >= GOOD_BITS:
            break
        recipe, plan = most_bits(planner, machines, _for_several(request), above=most)
        if recipe is None or plan is None:
            continue
        most, text = recipe.bits, hardware_text(machines) or ""
        best = _advice(
            "quantize and machines",
            f"{recipe.bits} bits, {format_bytes(plan.model.stored_bytes)}, on {text}",
            {"--quantize": str(recipe), "--hardware": text, **_several(request)},
            plan,
            quantize_command(planner.model.reference, recipe),
        )
    return best


def _other_machines(nodes: Sequence[NodeMemory]) -> Iterator[list[NodeMemory]]:
    """Yield more machines, larger ones of the same chip, or both: the fewest and smallest first."""
    if hardware_text(nodes) is None or len({node.chip for node in nodes}) != 1:
        return
    chip = chips().get(nodes[0].chip)
    if chip is None:  # a card of NVIDIA's: several are those of one host, which has no more
        return
    largest = max(node.memory_bytes for node in nodes)
    sizes = [size for size in sorted(chip.memory_gib) if size * GIB >= largest]
    for count in range(len(nodes), MOST_MACHINES + 1):
        for size in sizes:
            if count > len(nodes) or size * GIB > largest:
                yield numbered([catalog_node(chip, size)] * count)


def most_bits(
    planner: Planner, nodes: Sequence[NodeMemory], request: PlanRequest, above: int = 0
) -> tuple[Recipe | None, Plan | None]:
    """Return the recipe with the most bits, more than ``above``, that fits, and its plan."""
    for recipe in _recipes_with_fewer_bits(planner, nodes):
        if recipe.bits > above:
            plan = _fitting(Planner(planner.model.reference, str(recipe)), nodes, request)
            if plan is not None:
                return recipe, plan
    return None, None


def _recipes_with_fewer_bits(planner: Planner, nodes: Sequence[NodeMemory]) -> list[Recipe]:
    """Return recipes whose weights might fit, most bits first."""
    if planner.quantize is None and obstacle_to_quantizing(planner.model.config):
        return []
    given = max(BITS) + 1
    if planner.quantize is not None:
        given = parse_recipe(planner.quantize).most_bits_below
    limits = sum(node.limit_bytes for node in share_machines(nodes))
    weights = planner.model.facts.parameter_count
    fewer = [Recipe(bits) for bits in sorted(BITS, reverse=True) if bits < given]
    # Recipes that are surely too large are not traced. A group has a scale and a bias of 16 bits.
    return [
        recipe for recipe in fewer if weights * (recipe.bits + 32 / recipe.group_size) / 8 <= limits
    ]


def _larger_machines(
    planner: Planner, nodes: Sequence[NodeMemory], request: PlanRequest
) -> Advice | None:
    """Advise the same chips with the next larger memory that is enough."""
    if len({node.chip for node in nodes}) != 1 or nodes[0].chip not in chips():
        return None
    chip = chips()[nodes[0].chip]
    largest = max(node.memory_bytes for node in nodes)
    for size in sorted(chip.memory_gib):
        if size * GIB <= largest:
            continue
        machines = numbered([catalog_node(chip, size)] * len(nodes))
        plan = _fitting(planner, machines, request)
        if plan is not None:
            text = hardware_text(machines) or ""
            return _advice("machine", f"{text} instead", {"--hardware": text}, plan)
    return None


def _more_machines(
    planner: Planner, nodes: Sequence[NodeMemory], request: PlanRequest
) -> Advice | None:
    """Advise more machines like the last one."""
    if hardware_text(nodes) is None:
        return None
    for count in range(len(nodes) + 1, MOST_MACHINES + 1):
        machines = numbered([*nodes, *[nodes[-1]] * (count - len(nodes))])
        plan = _fitting(planner, machines, _for_several(request))
        if plan is not None:
            text = hardware_text(machines) or ""
            more = count - len(nodes)
            what = "another machine" if more == 1 else f"{more} more machines"
            options = {"--hardware": text, **_several(request)}
            return _advice("node", f"{what}: {text}", options, plan)
    return None


def _for_several(request: PlanRequest) -> PlanRequest:
    """Return the request without a strategy that needs a single machine."""
    return replace(request, strategy="auto") if request.strategy == "single" else request


def _several(request: PlanRequest) -> dict[str, str]:
    return {"--parallel": "auto"} if request.strategy == "single" else {}
