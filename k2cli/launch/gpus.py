"""The GPUs of a launch: which of them its ranks may have, and a saved plan's GPUs on this machine.

A GPU that another run of k2 holds is left out, unless the user wants to share it or to wait for the
other run's end. Memory that other programs hold is no longer free, so the plan counts without it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from k2cli.errors import ClusterError, DoesNotFitError, UsageError
from k2cli.launch.request import LaunchRequest
from k2cli.nodes.node import Node
from k2cli.planning.hardware.gpus import ONE_PROCESS, Gpu, describe_users
from k2cli.planning.hardware.machine import NodeMemory, on_gpus, planned_gpu, share_machines
from k2cli.planning.plan import NodeBudget, Plan
from k2cli.units import format_bytes


def machines_of(
    nodes: Sequence[Node],
    request: LaunchRequest,
    say: Callable[[str], None] = lambda text: None,
    *,
    as_if_ended: bool = False,
) -> list[NodeMemory]:
    """Ask each node for its memory, and leave it the GPUs that this launch may use.

    Args:
        nodes: one per rank.
        request: says if GPUs may be shared, or other runs be waited for.
        say: receives a line for each GPU that is left out.
        as_if_ended: return all GPUs as they will be once the other runs have ended.

    Raises:
        UsageError: if two names are of one machine, or ranks have to share a GPU that takes one
            process only.
        ClusterError: if a node cannot be asked, or none of its GPUs can be used.
    """
    ranks = [node.name for node in nodes]
    known: dict[str, NodeMemory] = {}
    for name, node in {node.name: node for node in nodes}.items():
        machine: NodeMemory = node.memory()
        _check_new(name, machine, known)
        kept = gpus_for_launch(
            machine.gpus,
            ranks.count(name),
            share=request.share,
            waits=request.wait_seconds > 0,
            as_if_ended=as_if_ended,
        )
        for gpu in machine.gpus:
            if gpu.obstacle or gpu.name not in [each.name for each in kept]:
                say(f"node {name}: {gpu.name.label} is left out: {_why(gpu)}")
        _check_enough(name, kept, ranks.count(name))
        known[name] = replace(machine, gpus=kept)
    return [known[name] for name in ranks]


def _check_new(name: str, machine: NodeMemory, known: Mapping[str, NodeMemory]) -> None:
    """Refuse a machine that is there under another name: its GPUs would be given away twice.

    Raises:
        UsageError: with both names.
    """
    own = {gpu.name.uuid for gpu in machine.gpus} - {""}
    for other, seen in known.items():
        common = [gpu.name for gpu in seen.gpus if gpu.name.uuid in own]
        if common:
            raise UsageError(
                f"nodes {other} and {name} are one machine: both have {common[0].label} "
                f"({common[0].uuid})",
                f"--nodes {other},{other}",
            )


def _check_enough(name: str, gpus: Sequence[Gpu], ranks: int) -> None:
    """Refuse a machine on which a rank would get a GPU that it cannot open.

    Raises:
        UsageError: if ranks have to share a GPU that takes one process only.
        ClusterError: if there are GPUs, and none can be used.
    """
    usable = [gpu for gpu in gpus if not gpu.obstacle]
    if gpus and not usable:
        first = gpus[0]
        raise ClusterError(f"node {name} has no usable GPU: {first.name.label}: {first.obstacle}")
    if usable and len(usable) < ranks and all(gpu.exclusive for gpu in usable):
        gpu = usable[0].name
        raise UsageError(
            f"node {name} has {len(usable)} usable GPU(s) for {ranks} ranks, and {gpu.label} "
            "takes one process only (compute mode Exclusive_Process)",
            f"sudo nvidia-smi -i {gpu.index} -c DEFAULT, or --nodes with fewer ranks",
        )


def gpus_in(machines: Sequence[NodeMemory]) -> list[tuple[str, str]]:
    """List the GPUs that may be used, by machine and UUID."""
    return [(machine.name, gpu.name.uuid) for machine in machines for gpu in machine.gpus]


def gpus_for_launch(
    gpus: Sequence[Gpu], ranks: int, *, share: bool, waits: bool, as_if_ended: bool = False
) -> tuple[Gpu, ...]:
    """Return the GPUs from which the ranks of one machine may get theirs.

    Args:
        gpus: all of the machine.
        ranks: number of ranks there.
        share: GPUs of other runs may be used, as far as their plans leave memory.
        waits: the launch waits for other runs to end if there are not enough free GPUs.
        as_if_ended: take all, those of other runs as they will be then.
    """
    if share:
        return tuple(_beside_others(gpu) for gpu in gpus)
    unheld = tuple(gpu for gpu in gpus if not gpu.held_by)
    usable = sum(not gpu.obstacle for gpu in unheld)
    if not as_if_ended and (usable >= ranks or (usable and not waits)):
        return unheld
    # The lock refuses them, or waits: until then, plan as if the other runs had ended.
    return tuple(gpu if not gpu.held_by else gpu.lasting() for gpu in gpus)


def _beside_others(gpu: Gpu) -> Gpu:
    """Count what other runs have planned, which they may not have loaded yet."""
    if gpu.exclusive and gpu.held_by and not gpu.obstacle:
        gpu = replace(gpu, obstacle=f"{ONE_PROCESS}, and {' and '.join(gpu.held_by)} holds it")
    left = max(gpu.idle_limit_bytes - gpu.claimed_bytes, 0)
    return replace(gpu, limit_bytes=min(gpu.limit_bytes, left))


def _why(gpu: Gpu) -> str:
    return gpu.obstacle or f"{' and '.join(gpu.held_by)} holds it"


def place_plan(plan: Plan, machines: Sequence[NodeMemory], *, force: bool) -> Plan:
    """Give the ranks of a plan that was read from a file their GPUs on these machines.

    Ranks keep the GPUs that the plan names if these are there and may be used. Otherwise they get
    as many as the plan has.

    Args:
        plan: its ranks are those of ``machines``, in order.
        machines: one per rank, with the GPUs that may be used.
        force: accept a GPU with too little free memory.

    Raises:
        DoesNotFitError: if a GPU has too little free memory, and ``force`` is not set.
    """
    placed = [planned_gpu(node, part.gpu) for node, part in zip(machines, plan.nodes, strict=True)]
    if any(node.gpus and node.gpu is None for node in placed):
        placed = on_gpus(machines, _most_on_one_machine(plan.nodes, machines))
    nodes = tuple(
        part if node.gpu is None else _moved(part, node, force=force)
        for node, part in zip(share_machines(placed), plan.nodes, strict=True)
    )
    return replace(plan, nodes=nodes)


def _most_on_one_machine(parts: Sequence[NodeBudget], machines: Sequence[NodeMemory]) -> int:
    """Count the GPUs that the plan has for the ranks of one machine, of several the most."""
    named = {machine.name: set[str]() for machine in machines}
    for part, machine in zip(parts, machines, strict=True):
        named[machine.name].add(part.place)
    return max(len(places) for places in named.values())


def _moved(part: NodeBudget, node: NodeMemory, *, force: bool) -> NodeBudget:
    headroom = node.limit_bytes - part.total_bytes
    assert node.gpu is not None
    if headroom < 0 and not force:
        gpu = next(each for each in node.gpus if each.name == node.gpu)
        users = describe_users(gpu)
        raise DoesNotFitError(
            f"the plan needs {format_bytes(part.total_bytes)} on {node.place}, and "
            f"{format_bytes(node.limit_bytes)} are free" + (f"; {users} use it" if users else ""),
            "nvidia-smi shows who uses it; or --force to try anyway",
        )
    return replace(
        part,
        memory_bytes=node.memory_bytes,
        limit_bytes=node.limit_bytes,
        headroom_bytes=headroom,
        limit_source=node.limit_source,
        gpu=node.gpu,
    )
