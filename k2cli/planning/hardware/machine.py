"""Machines and their rates, for planning; and the detection of this machine.

A plan needs above all the number of bytes that MLX may use on a machine. A Mac reports it
(``max_recommended_working_set_size``). For a machine that is only named, the catalog (``chips.py``)
holds logged values. On Linux it is the memory without what the system keeps, or with CUDA that of
each GPU by itself (``gpus.py``).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from k2cli.choices import Certainty, Device
from k2cli.errors import K2Error
from k2cli.gpu_name import GpuName
from k2cli.planning.hardware.cards import card_of_device
from k2cli.planning.hardware.chips import chip_of_device
from k2cli.planning.hardware.gpus import (
    CONTEXT_BYTES,
    Gpu,
    by_preference,
    describe_users,
    gpus_for_ranks,
    usable_gpus,
)
from k2cli.units import GIB, MB, format_bytes, whole_number

GIVEN = "given in --hardware"

OS_RESERVE_SHARE = 0.06
OS_RESERVE_BYTES = GIB
"""Memory that Linux, its services and the page cache need: this share, and at least so many bytes.
Assumed; an idle server needs less, a desktop with a browser more."""


@dataclass(frozen=True, slots=True)
class NodeRates:
    """Rates that a machine reaches, per second, and fixed seconds of a layer beside its bytes.

    ``dense``, ``expert`` and ``attention`` are operations per second for a prompt: for matrices
    that all tokens share, for matrices that the tokens are spread over, and for attention.
    ``rows_share`` is the share of these rates that tokens of several requests, decoded together,
    reach; ``decode_attention_share`` the share that a single token's attention reaches.
    ``load_bytes_per_second`` limits a single token's attention whose query heads share keys and
    values: the kernel loads these once per query head, mostly from the GPU's caches. None is no
    limit. ``low`` and ``high`` are the bounds of what has been published.
    """

    read_bytes_per_second: float
    dense_flops_per_second: float
    expert_flops_per_second: float
    attention_flops_per_second: float
    dense_layer_seconds: float
    expert_layer_seconds: float
    rows_share: float = 1.0
    decode_attention_share: float = 1.0
    load_bytes_per_second: float | None = None
    load_bytes_per_second_low: float | None = None
    load_bytes_per_second_high: float | None = None

    def with_attention(self, factor: float) -> NodeRates:
        """Return these rates with another speed of attention, and the bound of its loads."""
        loads = self.load_bytes_per_second_low if factor < 1 else self.load_bytes_per_second_high
        return replace(
            self,
            attention_flops_per_second=self.attention_flops_per_second * factor,
            load_bytes_per_second=self.load_bytes_per_second if loads is None else loads,
        )

    def shared_by(self, ranks: int) -> NodeRates:
        """Return the rates of one of several ranks that compute at the same time on one machine."""
        if ranks == 1:
            return self
        return replace(
            self,
            read_bytes_per_second=self.read_bytes_per_second / ranks,
            dense_flops_per_second=self.dense_flops_per_second / ranks,
            expert_flops_per_second=self.expert_flops_per_second / ranks,
            attention_flops_per_second=self.attention_flops_per_second / ranks,
            load_bytes_per_second=_part(self.load_bytes_per_second, ranks),
            load_bytes_per_second_low=_part(self.load_bytes_per_second_low, ranks),
            load_bytes_per_second_high=_part(self.load_bytes_per_second_high, ranks),
        )


def _part(rate: float | None, ranks: int) -> float | None:
    return None if rate is None else rate / ranks


@dataclass(frozen=True, slots=True)
class MeasuredSpeed:
    """The result of ``k2 bench --calibrate`` for a machine and for the link between the ranks.

    ``collective_seconds`` is None after a run of one rank. ``source`` is the day and the model;
    ``deviation`` is the standard deviation of the logarithms of repeated measurements.
    """

    rates: NodeRates
    collective_seconds: float | None
    source: str
    deviation: float = 0.0


@dataclass(frozen=True, slots=True)
class NodeMemory:
    """One machine: its memory in bytes, and its speed if known.

    ``limit_bytes`` is what MLX may use; ``limit_mark`` and ``limit_source`` give its certainty and
    its source. Nodes of one name are ranks on one machine and share its limit: see
    ``share_machines``. ``chip`` is an identifier of the catalog, empty for others. Bandwidth is the
    chip's peak; ``gpu_flops_per_second`` counts multiplications and additions in 16-bit floats, as
    published. ``price_usd`` is the last list price of the cheapest configuration with this memory.
    ``measured`` is the owner's calibration and replaces the published figures.

    ``gpus`` are those of the machine, if MLX computes there with CUDA. ``gpu`` is the one that a
    rank was given (``on_gpus``); memory and limit are then those of this GPU.
    """

    name: str
    memory_bytes: int
    limit_bytes: int
    limit_mark: Certainty
    device: Device
    limit_source: str = ""
    chip: str = ""
    bandwidth_bytes_per_second: int | None = None
    gpu_flops_per_second: int | None = None
    price_usd: int | None = None
    measured: MeasuredSpeed | None = None
    gpus: tuple[Gpu, ...] = ()
    gpu: GpuName | None = None

    @property
    def place(self) -> str:
        """The memory and the processor that ranks share: a machine, or one GPU of a machine."""
        return self.name if self.gpu is None else f"{self.name} {self.gpu.short}"


def on_gpus(nodes: Sequence[NodeMemory], most: int | None = None) -> list[NodeMemory]:
    """Give each rank on a machine with GPUs one of them; memory and limit become this GPU's.

    Ranks that have a GPU already keep it. With more ranks than GPUs the others share.

    Args:
        nodes: one per rank; nodes of one name are ranks on one machine.
        most: use at most so many GPUs of a machine.
    """
    chosen: dict[str, list[Gpu]] = {}
    placed = []
    for node in nodes:
        if node.gpu is not None or not node.gpus:
            placed.append(node)
            continue
        if node.name not in chosen:
            ranks = sum(other.name == node.name for other in nodes)
            chosen[node.name] = gpus_for_ranks(node.gpus, ranks, most)
        rest = chosen[node.name]
        placed.append(on_gpu(node, rest.pop(0)) if rest else node)
    return placed


def on_gpu(node: NodeMemory, gpu: Gpu) -> NodeMemory:
    """Return the machine as a rank on this GPU sees it, with the speed of its kind."""
    found = card_of_device(gpu.name.name, gpu.memory_bytes)
    if found is not None:
        card, size = found
        node = replace(
            node,
            chip=card.identifier,
            bandwidth_bytes_per_second=size.bandwidth_bytes_per_second,
            gpu_flops_per_second=card.flops_per_second,
        )
    return replace(
        node,
        memory_bytes=gpu.memory_bytes,
        limit_bytes=gpu.limit_bytes,
        limit_source=node.limit_source if node.limit_source == GIVEN else gpu_limit_source(gpu),
        gpu=gpu.name,
    )


def planned_gpu(node: NodeMemory, name: GpuName | None) -> NodeMemory:
    """Return the machine as a rank sees it on the GPU of a plan, if the machine has that GPU."""
    if name is None or not name.uuid:
        return node
    found = [gpu for gpu in node.gpus if gpu.name.uuid == name.uuid and not gpu.obstacle]
    return on_gpu(node, found[0]) if found else node


def gpu_limit_source(gpu: Gpu) -> str:
    """State where the limit of a GPU comes from, and who else uses its memory."""
    context = f"less {format_bytes(CONTEXT_BYTES)} for the CUDA context"
    if gpu.free_bytes is None:
        return f"memory of {gpu.name.label} {context}"
    used = gpu.memory_bytes - gpu.free_bytes
    if used < 64 * MB:
        return f"free memory of {gpu.name.label} {context}"
    users = describe_users(gpu)
    by = f" by {users}" if users else ""
    return f"free memory of {gpu.name.label}, {format_bytes(used)} being used{by}, {context}"


def share_machines(nodes: Sequence[NodeMemory]) -> list[NodeMemory]:
    """Divide the limit of a machine, or of one of its GPUs, among the ranks on it.

    Nodes of one name are one machine. A GPU's ranks need a CUDA context each.
    """
    shared = []
    for node in on_gpus(nodes):
        ranks = sum(other.place == node.place for other in on_gpus(nodes))
        if ranks > 1:
            source = f"{node.limit_source}; shared by {ranks} ranks"
            others = 0 if node.gpu is None else (ranks - 1) * CONTEXT_BYTES
            limit = max(node.limit_bytes - others, 0) // ranks
            node = replace(node, limit_bytes=limit, limit_source=source)
        shared.append(node)
    return shared


def this_machine(name: str = "localhost") -> NodeMemory:
    """Return this machine as MLX sees it: Metal's working set, CUDA's GPUs, or Linux memory.

    Raises:
        K2Error: if MLX is built for CUDA and may use no GPU.
    """
    import mlx.core as mx

    if mx.metal.is_available():
        return _apple_machine(name, mx.device_info())
    if mx.cuda.is_available():  # true if MLX is built for CUDA, with or without a GPU
        count = mx.device_count(mx.DeviceType.gpu)
        devices = [mx.device_info(mx.Device(mx.DeviceType.gpu, order)) for order in range(count)]
        return cuda_machine(name, devices)
    return _cpu_machine(name, _usable_memory_bytes())


def cuda_machine(name: str, devices: Sequence[Mapping[str, Any]]) -> NodeMemory:
    """Build a machine from MLX's information on its CUDA devices; its limit is the best GPU's.

    Raises:
        K2Error: if there is none.
    """
    gpus = usable_gpus(devices, _cpu_machine(name, _usable_memory_bytes()).limit_bytes)
    if not gpus:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        why = f" (CUDA_VISIBLE_DEVICES is '{visible}')" if visible is not None else ""
        raise K2Error(f"MLX is built for CUDA here, and finds no GPU{why}", "nvidia-smi -L")
    best = next(iter(by_preference(gpus)), gpus[0])
    return NodeMemory(
        name,
        best.memory_bytes,
        best.limit_bytes,
        "modelled",
        "cuda",
        gpu_limit_source(best),
        gpus=gpus,
    )


def _apple_machine(name: str, info: Mapping[str, Any]) -> NodeMemory:
    """Build a Mac from Metal's device information; its speed is that of its chip's usual GPU."""
    memory = int(info["memory_size"])
    chip = chip_of_device(str(info.get("device_name", "")))
    cores = chip.usual_gpu_cores(memory // GIB) if chip else 0
    return NodeMemory(
        name,
        memory,
        int(info["max_recommended_working_set_size"]),
        "exact",
        "metal",
        "the device's max_recommended_working_set_size",
        chip=chip.identifier if chip else "",
        bandwidth_bytes_per_second=chip.bandwidth_bytes_per_second(cores, memory // GIB)
        if chip
        else None,
        gpu_flops_per_second=chip.flops_per_second(cores) if chip else None,
    )


def _cpu_machine(name: str, memory_bytes: int) -> NodeMemory:
    reserve = max(OS_RESERVE_BYTES, int(memory_bytes * OS_RESERVE_SHARE))
    source = "memory less what the system is assumed to keep"
    return NodeMemory(name, memory_bytes, max(memory_bytes - reserve, 0), "assumed", "cpu", source)


def _usable_memory_bytes() -> int:
    """Return physical memory, or the control group's limit (containers) if that is less."""
    import psutil

    memory = int(psutil.virtual_memory().total)
    if sys.platform == "linux":
        for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
            try:
                text = Path(path).read_text(encoding="ascii").strip()
            except OSError:
                continue
            limit = whole_number(text)
            if limit is not None:
                memory = min(memory, limit)
    return memory
