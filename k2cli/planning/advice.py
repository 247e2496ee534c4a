"""What would make a plan fit: the smallest change of each kind, every one of them planned again.

Quantized KV caches are not advised: k2's engine does not run them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from k2cli.errors import K2Error
from k2cli.planning.hardware.chips import chips
from k2cli.planning.hardware.machine import NodeMemory, share_machines
from k2cli.planning.hardware.spec import catalog_node
from k2cli.planning.model import quantize_command
from k2cli.planning.plan import Advice, Plan
from k2cli.planning.planner import Planner, Wishes, strategies_for
from k2cli.planning.search.candidates import GOOD_CHUNK_TOKENS
from k2cli.planning.search.limits import max_context_length
from k2cli.sharding.recipe import BITS, Recipe, obstacle_to_quantizing, parse_recipe
from k2cli.units import GIB, MIB, format_bytes, format_gib

SHORTEST_CONTEXT = 1024
"""A context that is shorter helps nobody, and is not advised."""

CONTEXT_STEP = 1024
"""Advised contexts are multiples of this."""

MOST_MACHINES = 4
"""Machines that are advised at most: beyond that links, not memory, are the question."""

GOOD_BITS = 4
"""Bits of a weight below which answers become noticeably worse: more machines are advised rather
than fewer bits than this."""

MACOS_SHARE = 0.04
MACOS_BYTES = 16 * GIB
"""What a raised GPU limit must leave to macOS (assumed): this share of memory, at least so much.
Wiring more than there is can panic the kernel (mlx-lm issue 883)."""

_RAISABLE = "sudo sysctl iogpu.wired_limit_mb={megabytes}"


def advised_plan(planner: Planner, nodes: Sequence[NodeMemory], wishes: Wishes) -> Plan:
    """A plan with its limits and, if it does not fit, with what would make it fit.

    Raises:
        UsageError: as ``Planner.plan``.
    """
    plan = planner.plan(nodes, wishes)
    return replace(plan, advice=advise(planner, nodes, wishes, plan))


def advise(
    planner: Planner, nodes: Sequence[NodeMemory], wishes: Wishes, plan: Plan
) -> tuple[Advice, ...]:
    """Changes that make a plan fit which does not, those that cost least first.

    Args:
        planner: what made the plan; its traces are used again.
        plan: with its limits searched (``max_context_length``, ``max_concurrency``).
    """
    if plan.fits:
        return ()
    kinds: tuple[Callable[[], Advice | None], ...] = (
        lambda: _smaller_chunk(planner, nodes, wishes),
        lambda: _other_strategy(planner, nodes, wishes),
        lambda: _raised_limit(planner, nodes, wishes),
        lambda: _fewer_sequences(planner, nodes, wishes, plan),
        lambda: _shorter_context(planner, nodes, wishes, plan),
        lambda: _fewer_bits(planner, nodes, wishes),
        lambda: _larger_machines(planner, nodes, wishes),
        lambda: _more_machines(planner, nodes, wishes),
    )
    found = [advice for kind in kinds if (advice := kind()) is not None]
    if not any(advice.kind in ("machine", "node") for advice in found):
        both = _fewer_bits_on_other_machines(planner, nodes, wishes, found)
        found += [both] if both is not None else []
    return tuple(found)


def _fitting(planner: Planner, nodes: Sequence[NodeMemory], wishes: Wishes) -> Plan | None:
    """The plan, if it fits; None too where it is impossible."""
    try:
        if not planner.ground(nodes, wishes).could_fit:
            return None
        plan = planner.plan(nodes, wishes, limits=False)
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


def _smaller_chunk(planner: Planner, nodes: Sequence[NodeMemory], wishes: Wishes) -> Advice | None:
    if wishes.chunk_tokens is None:
        return None
    plan = _fitting(planner, nodes, replace(wishes, chunk_tokens=None))
    if plan is None:
        return None
    chunk = plan.request.prefill_chunk_tokens
    return _advice("chunk", f"prefill in chunks of {chunk} tokens", {"--chunk": str(chunk)}, plan)


def _other_strategy(planner: Planner, nodes: Sequence[NodeMemory], wishes: Wishes) -> Advice | None:
    if wishes.strategy == "auto" or len(nodes) == 1:
        return None
    plan = _fitting(planner, nodes, replace(wishes, strategy="auto"))
    if plan is None:
        return None
    strategy = plan.placement.strategy
    return _advice("strategy", f"{strategy} instead", {"--parallel": strategy}, plan)


def _raised_limit(planner: Planner, nodes: Sequence[NodeMemory], wishes: Wishes) -> Advice | None:
    """Macs let the GPU have more of their memory until the next reboot."""
    if any(node.device != "metal" for node in nodes):
        return None
    most = [
        replace(node, limit_bytes=max(node.limit_bytes, raisable_limit(node.memory_bytes)))
        for node in nodes
    ]
    widest = _fitting(planner, most, wishes)
    if widest is None:
        return None
    needed: dict[int, int] = {}  # the same for all Macs of one memory size: one thing to remember
    for node in nodes:
        total = max(budget.total_bytes for budget in widest.nodes if budget.name == node.name)
        needed[node.memory_bytes] = max(needed.get(node.memory_bytes, 0), total)
    raised = [
        replace(node, limit_bytes=max(node.limit_bytes, -(-needed[node.memory_bytes] // GIB) * GIB))
        for node in nodes
    ]
    plan = _fitting(planner, raised, wishes)
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
    """How far a Mac's GPU limit can be raised while macOS keeps what it needs."""
    return memory_bytes - max(MACOS_BYTES, int(memory_bytes * MACOS_SHARE))


def _fewer_sequences(
    planner: Planner, nodes: Sequence[NodeMemory], wishes: Wishes, plan: Plan
) -> Advice | None:
    fewer = plan.max_concurrency
    if not 0 < fewer < wishes.concurrency:
        return None
    what = "one sequence" if fewer == 1 else f"{fewer} sequences"
    fitting = _fitting(planner, nodes, replace(wishes, concurrency=fewer))
    return _advice("concurrency", f"{what} at a time", {"--concurrency": str(fewer)}, fitting)


def _shorter_context(
    planner: Planner, nodes: Sequence[NodeMemory], wishes: Wishes, plan: Plan
) -> Advice | None:
    """The longest context that leaves room for a good prefill chunk; for any chunk if none does."""
    possible = [each.name for each in plan.alternatives if each.possible]
    strategies = [each for each in strategies_for(wishes.strategy, len(nodes)) if each in possible]
    good = replace(wishes, chunk_tokens=wishes.chunk_tokens or GOOD_CHUNK_TOKENS)
    for longest in (
        max_context_length(planner.ground(nodes, good), strategies),
        plan.max_context_length,
    ):
        context = longest // CONTEXT_STEP * CONTEXT_STEP
        if SHORTEST_CONTEXT <= context < plan.request.context_length:
            fitting = _fitting(planner, nodes, replace(wishes, context_length=context))
            what = f"a context of {context:,} tokens"
            return _advice("context", what, {"--context": str(context)}, fitting)
    return None


def _fewer_bits(planner: Planner, nodes: Sequence[NodeMemory], wishes: Wishes) -> Advice | None:
    """The most bits that fit, if the model can be quantized by k2 and is not yet that small."""
    recipe, plan = most_bits(planner, nodes, wishes)
    if recipe is None or plan is None:
        return None
    return _advice(
        "quantize",
        f"{recipe.bits} bits, {format_bytes(plan.model.stored_bytes)}",
        {"--quantize": str(recipe)},
        plan,
        quantize_command(planner.model, recipe),
    )


def _fewer_bits_on_other_machines(
    planner: Planner, nodes: Sequence[NodeMemory], wishes: Wishes, found: Sequence[Advice]
) -> Advice | None:
    """Both at once, where other machines alone do not do: few machines, and not too few bits.

    Nothing if fewer bits alone already keep ``GOOD_BITS``.
    """
    alone = [parse_recipe(each.options["--quantize"]).bits for each in found
             if each.kind == "quantize"]  # fmt: skip
    most = max(alone, default=0)
    best: Advice | None = None
    for machines in _other_machines(nodes):
        if most >= GOOD_BITS:
            break
        recipe, plan = most_bits(planner, machines, _for_several(wishes), above=most)
        if recipe is None or plan is None:
            continue
        most, text = recipe.bits, hardware_text(machines) or ""
        best = _advice(
            "quantize and machines",
            f"{recipe.bits} bits, {format_bytes(plan.model.stored_bytes)}, on {text}",
            {"--quantize": str(recipe), "--hardware": text, **_several(wishes)},
            plan,
            quantize_command(planner.model, recipe),
        )
    return best


def _other_machines(nodes: Sequence[NodeMemory]) -> Iterator[list[NodeMemory]]:
    """More machines, larger ones of the same chip, or both; the fewest first, then the smallest."""
    if hardware_text(nodes) is None or len({node.chip for node in nodes}) != 1:
        return
    chip = chips()[nodes[0].chip]
    largest = max(node.memory_bytes for node in nodes)
    sizes = [size for size in sorted(chip.memory_gib) if size * GIB >= largest]
    for count in range(len(nodes), MOST_MACHINES + 1):
        for size in sizes:
            if count > len(nodes) or size * GIB > largest:
                yield numbered([catalog_node(chip, size)] * count)


def most_bits(
    planner: Planner, nodes: Sequence[NodeMemory], wishes: Wishes, above: int = 0
) -> tuple[Recipe | None, Plan | None]:
    """The recipe of most bits, more than ``above``, that fits, with its plan."""
    for recipe in _recipes_with_fewer_bits(planner, nodes):
        if recipe.bits > above:
            plan = _fitting(Planner(planner.model, str(recipe)), nodes, wishes)
            if plan is not None:
                return recipe, plan
    return None, None


def _recipes_with_fewer_bits(planner: Planner, nodes: Sequence[NodeMemory]) -> list[Recipe]:
    """Recipes whose weights might fit, most bits first."""
    if planner.quantize is None and obstacle_to_quantizing(planner.subject.config):
        return []
    given = max(BITS) + 1
    if planner.quantize is not None:
        given = parse_recipe(planner.quantize).most_bits_below
    limits = sum(node.limit_bytes for node in share_machines(nodes))
    weights = planner.subject.facts.parameter_count
    fewer = [Recipe(bits) for bits in sorted(BITS, reverse=True) if bits < given]
    # What is surely too much is not traced: a scale and a bias of 16 bits each go with a group.
    return [
        recipe for recipe in fewer if weights * (recipe.bits + 32 / recipe.group_size) / 8 <= limits
    ]


def _larger_machines(
    planner: Planner, nodes: Sequence[NodeMemory], wishes: Wishes
) -> Advice | None:
    """The same chips with the next larger memory that is enough."""
    if len({node.chip for node in nodes}) != 1 or nodes[0].chip not in chips():
        return None
    chip = chips()[nodes[0].chip]
    largest = max(node.memory_bytes for node in nodes)
    for size in sorted(chip.memory_gib):
        if size * GIB <= largest:
            continue
        machines = numbered([catalog_node(chip, size)] * len(nodes))
        plan = _fitting(planner, machines, wishes)
        if plan is not None:
            text = hardware_text(machines) or ""
            return _advice("machine", f"{text} instead", {"--hardware": text}, plan)
    return None


def _more_machines(planner: Planner, nodes: Sequence[NodeMemory], wishes: Wishes) -> Advice | None:
    """More machines like the last one."""
    if hardware_text(nodes) is None:
        return None
    for count in range(len(nodes) + 1, MOST_MACHINES + 1):
        machines = numbered([*nodes, *[nodes[-1]] * (count - len(nodes))])
        plan = _fitting(planner, machines, _for_several(wishes))
        if plan is not None:
            text = hardware_text(machines) or ""
            more = count - len(nodes)
            what = "another machine" if more == 1 else f"{more} more machines"
            options = {"--hardware": text, **_several(wishes)}
            return _advice("node", f"{what}: {text}", options, plan)
    return None


def _for_several(wishes: Wishes) -> Wishes:
    """Wishes that several machines can be planned by."""
    return replace(wishes, strategy="auto") if wishes.strategy == "single" else wishes


def _several(wishes: Wishes) -> dict[str, str]:
    return {"--parallel": "auto"} if wishes.strategy == "single" else {}


# --- machines as --hardware writes them ---------------------------------------------------------


def numbered(nodes: Sequence[NodeMemory]) -> list[NodeMemory]:
    """Machines of the catalog with names of their own, as ``parse_hardware`` names them."""
    plain = [node.name.partition("/")[0] for node in nodes]
    return [
        replace(
            node, name=f"{name}/{plain[: i + 1].count(name)}" if plain.count(name) > 1 else name
        )
        for i, (node, name) in enumerate(zip(nodes, plain, strict=True))
    ]


def hardware_text(nodes: Sequence[NodeMemory]) -> str | None:
    """What to write after ``--hardware`` for these machines; None if they are none of the catalog.

    Only a changed limit can be written; who changed more has to write it.
    """
    terms: list[tuple[str, int]] = []
    for node in nodes:
        term = _term(node)
        if term is None:
            return None
        if terms and terms[-1][0] == term:
            terms[-1] = (term, terms[-1][1] + 1)
        else:
            terms.append((term, 1))
    return " + ".join(f"{count}x {term}" if count > 1 else term for term, count in terms)


def _term(node: NodeMemory) -> str | None:
    chip, size = chips().get(node.chip), node.memory_bytes // GIB
    if chip is None or size not in chip.memory_gib:
        return None
    listed = catalog_node(chip, size)
    if node.name.partition("/")[0] != listed.name:
        return None
    same = replace(node, name=listed.name, limit_bytes=0, limit_mark="exact", limit_source="")
    if same != replace(listed, limit_bytes=0, limit_mark="exact", limit_source=""):
        return None
    if node.limit_bytes == listed.limit_bytes:
        return listed.name
    return f"{listed.name}:limit={node.limit_bytes // GIB}GiB"
