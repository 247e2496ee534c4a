"""What machines have, for planning; and this machine as it is.

A plan needs one number of a machine above all: how many bytes MLX may use there. A Mac knows it
(``max_recommended_working_set_size``); for a machine that is only named, the catalog (``chips.py``)
has what such machines have logged. On Linux it is memory less what the system keeps.
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
"""What Linux, its services and the page cache's working part keep: this share, at least this much.
Assumed; an idle server keeps less, a desktop with a browser more."""


@dataclass(frozen=True, slots=True)
class NodeRates:
    """What a machine achieves, per second, and what a layer costs beside its bytes, in seconds.

    ``dense``, ``expert`` and ``attention`` are operations per second of a prompt's matrices that
    all tokens share, of matrices that the tokens are spread over, and of attention.
    ``rows_share`` is what several requests' tokens, decoded together, reach of a prompt's rates,
    ``decode_attention_share`` what a single token's attention reaches of a prompt's.
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
        """The rates of one of several ranks that compute at the same time on one machine."""
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
    """What ``k2 bench --calibrate`` found of a machine and of the link between its run's ranks.

    ``collective_seconds`` is None after a run of one rank. ``source`` says when and with what;
    ``deviation`` is what repetitions differed by, as the standard deviation of their logarithms.
    """

    rates: NodeRates
    collective_seconds: float | None
    source: str
    deviation: float = 0.0


@dataclass(frozen=True, slots=True)
class NodeMemory:
    """One machine: its memory in bytes, and how fast it reads and computes where that is known.

    ``limit_bytes`` is what MLX may use there; ``limit_mark`` and ``limit_source`` say how it is
    known. Nodes of one name are ranks on one machine and share its limit: see ``share_machines``.
    ``chip`` is an identifier of the catalog, empty for others. Bandwidth is the chip's peak;
    ``gpu_flops_per_second`` counts multiplications and additions in 16-bit floats, as published.
    ``price_usd`` is the last list price of the cheapest configuration with this memory.
    ``measured`` is what the owner calibrated; it then counts instead of the published figures.
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
    """This machine, as MLX sees it: Metal's working set, a CUDA device, or memory on Linux."""
    import mlx.core as mx

    if mx.metal.is_available():
        return _apple_machine(name, mx.device_info())
    if mx.cuda.is_available():
        total = int(mx.device_info()["total_memory"])
        return NodeMemory(name, total, total, "exact", "cuda", "the device's total memory")
    return _cpu_machine(name, _usable_memory_bytes())


def _apple_machine(name: str, info: Mapping[str, Any]) -> NodeMemory:
    """A Mac by what Metal says of it. Its speed is that of its chip's usual GPU, if it is known."""
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
    """Physical memory, or the control group's limit where that is less (containers)."""
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
