"""Machines and their rates, for planning; and the detection of this machine.

A plan needs above all the number of bytes that MLX may use on a machine. A Mac reports it
(``max_recommended_working_set_size``). For a machine that is only named, the catalog (``chips.py``)
holds logged values. On Linux it is the memory without what the system keeps.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from k2cli.choices import Certainty, Device
from k2cli.planning.hardware.chips import chip_of_device
from k2cli.units import GIB

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
    """

    read_bytes_per_second: float
    dense_flops_per_second: float
    expert_flops_per_second: float
    attention_flops_per_second: float
    dense_layer_seconds: float
    expert_layer_seconds: float
    rows_share: float = 1.0
    decode_attention_share: float = 1.0

    def shared_by(self, ranks: int) -> NodeRates:
        """Return the rates of one of several ranks that compute at the same time on one machine."""
        return NodeRates(
            self.read_bytes_per_second / ranks,
            self.dense_flops_per_second / ranks,
            self.expert_flops_per_second / ranks,
            self.attention_flops_per_second / ranks,
            self.dense_layer_seconds,
            self.expert_layer_seconds,
            self.rows_share,
            self.decode_attention_share,
        )


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


def share_machines(nodes: Sequence[NodeMemory]) -> list[NodeMemory]:
    """Divide the limit of a machine among the ranks on it: nodes of one name are one machine."""
    shared = []
    for node in nodes:
        ranks = sum(other.name == node.name for other in nodes)
        if ranks > 1:
            source = f"{node.limit_source}; shared by {ranks} ranks"
            node = replace(node, limit_bytes=node.limit_bytes // ranks, limit_source=source)
        shared.append(node)
    return shared


def this_machine(name: str = "localhost") -> NodeMemory:
    """Return this machine as MLX sees it: Metal's working set, a CUDA device, or Linux memory."""
    import mlx.core as mx

    if mx.metal.is_available():
        return _apple_machine(name, mx.device_info())
    if mx.cuda.is_available():
        total = int(mx.device_info()["total_memory"])
        return NodeMemory(name, total, total, "exact", "cuda", "the device's total memory")
    return _cpu_machine(name, _usable_memory_bytes())


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
            if text.isdigit():
                memory = min(memory, int(text))
    return memory
