"""The GPUs of this machine, with the runs of k2 that hold them by their locks."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace

from k2cli.agent.locks import Claim, list_locks
from k2cli.agent.run_processes import count_processes
from k2cli.planning.hardware.gpus import Gpu
from k2cli.planning.hardware.machine import NodeMemory, this_machine


def machine_with_runs() -> NodeMemory:
    """Return this machine as MLX sees it, its GPUs with the runs that hold them.

    Raises:
        K2Error: if MLX is built for CUDA and may use no GPU.
    """
    machine = this_machine()
    claims: list[Claim] = []
    if machine.gpus:
        with suppress(OSError):  # taking the locks will report it
            locks = list_locks(count_processes)
            claims = [lock.claim for lock in locks if lock.state != "stale"]
    return replace(machine, gpus=tuple(_held(gpu, claims) for gpu in machine.gpus))


def _held(gpu: Gpu, claims: list[Claim]) -> Gpu:
    held = [
        (claim.run_id, part.bytes)
        for claim in claims
        for part in claim.devices
        if gpu.name.uuid and part.uuid == gpu.name.uuid
    ]
    if not held:
        return gpu
    runs = tuple(run_id for run_id, _ in held)
    return replace(gpu, held_by=runs, claimed_bytes=sum(size for _, size in held))
