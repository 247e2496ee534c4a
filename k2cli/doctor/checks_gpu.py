"""Checks of NVIDIA GPUs: who uses them, if MLX computes on them, and if a plan fits on them."""

from __future__ import annotations

import shlex
from collections.abc import Iterable

from k2cli.cluster.facts.machine import MachineFacts
from k2cli.doctor.results import CheckResult, Need, Situation
from k2cli.nodes.node import LOCALHOST
from k2cli.planning.hardware.gpus import CONTEXT_BYTES, Gpu, describe_users, gpus_for_ranks
from k2cli.units import format_bytes

BUSY_SHARE = 0.1
"""A GPU of which other programs hold more than this share gets a warning. A desktop takes less."""


def gpus(situation: Situation) -> Iterable[CheckResult]:
    """Name each GPU, its free memory and who uses it; warn of GPUs that MLX does not use."""
    for node, machine in situation.machines.items():
        if machine.gpus and machine.backend != "cuda":
            names = ", ".join(gpu.name.label for gpu in machine.gpus)
            yield CheckResult(
                "warn",
                "GPU",
                node,
                f"MLX there is built without CUDA and computes on the CPU, not on {names}",
                _with_cuda(situation, node),
            )
            continue
        for gpu in machine.gpus:
            yield CheckResult("warn" if _is_busy(gpu) else "pass", "GPU", node, _detail(gpu))


def _with_cuda(situation: Situation, node: str) -> str:
    """Return the command that replaces mlx's package for the CPU on a node."""
    python = situation.software[node].python if node in situation.software else "python3"
    quoted = shlex.quote(python)
    replace = f"{quoted} -m pip uninstall -y mlx-cpu && {quoted} -m pip install mlx-cuda-13"
    return replace if node == LOCALHOST else f"ssh -t {node} {shlex.quote(replace)}"


def _is_busy(gpu: Gpu) -> bool:
    used = 0 if gpu.free_bytes is None else gpu.memory_bytes - gpu.free_bytes
    return bool(gpu.obstacle or gpu.held_by) or used > BUSY_SHARE * gpu.memory_bytes


def _detail(gpu: Gpu) -> str:
    total = format_bytes(gpu.memory_bytes)
    parts = [f"{total}, shared with the processor"]
    if gpu.free_bytes is not None:
        parts = [f"{format_bytes(gpu.free_bytes)} of {total} free"]
    if gpu.held_by:
        parts.append(f"held by {' and '.join(gpu.held_by)}")
    if users := describe_users(gpu):
        parts.append(f"used by {users}")
    if gpu.obstacle:
        parts.append(f"left out by k2: {gpu.obstacle}")
    return f"{gpu.name.label}: {', '.join(parts)}"


def memory(situation: Situation) -> Iterable[CheckResult]:
    """Check that a plan's ranks fit into the free memory of the GPUs that they would get."""
    for node, machine in situation.machines.items():
        need = situation.needs.get(node)
        if need is None or machine.backend != "cuda" or not machine.gpus:
            continue
        problem = _shortfall(machine, need)
        if problem is None:
            count = len(need.ranks_bytes) or 1
            detail = f"{count} rank(s) of the plan fit on {_named(_chosen(machine, need))}"
            yield CheckResult("pass", "GPU memory", node, detail)
        else:
            hint = "plan for less: k2 plan-memory MODEL --context N; or end what uses the GPU"
            yield CheckResult("fail", "GPU memory", node, problem, hint)


def _chosen(machine: MachineFacts, need: Need) -> list[Gpu]:
    unheld = [gpu for gpu in machine.gpus if not gpu.held_by] or machine.gpus
    return gpus_for_ranks(unheld, len(need.ranks_bytes) or 1)


def _shortfall(machine: MachineFacts, need: Need) -> str | None:
    """Name the first GPU without the memory for its ranks; every rank has a context of its own."""
    chosen = _chosen(machine, need)
    if not chosen:
        return "none of the GPUs can be used: " + _named(machine.gpus)
    ranks = need.ranks_bytes or (need.total_bytes,)
    for gpu in dict.fromkeys(chosen):
        here = [size for size, own in zip(ranks, chosen, strict=True) if own == gpu]
        wanted = sum(here) + (len(here) - 1) * CONTEXT_BYTES
        if wanted > gpu.limit_bytes:
            return (
                f"the plan needs {format_bytes(wanted)} on {gpu.name.label}, "
                f"of which a run may use {format_bytes(gpu.limit_bytes)}"
            )
    return None


def _named(gpus: Iterable[Gpu]) -> str:
    return ", ".join(dict.fromkeys(gpu.name.label for gpu in gpus))
