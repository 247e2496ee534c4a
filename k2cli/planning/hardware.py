"""What machines have: the catalog of Apple chips, this machine as it is, and ``--hardware`` specs.

A plan needs one number of a machine above all: how many bytes MLX may use there. A Mac knows it
(``max_recommended_working_set_size``); for a machine that is only named, ``hardware.toml`` has
what such machines have logged. On Linux it is memory less what the system keeps.
"""

from __future__ import annotations

import difflib
import functools
import re
import sys
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from k2cli.errors import UsageError
from k2cli.planning.marks import Mark
from k2cli.units import GIB

Backend = Literal["metal", "cuda", "cpu"]

OS_RESERVE_SHARE = 0.06
OS_RESERVE_BYTES = GIB
"""What Linux, its services and the page cache's working part keep: this share, at least this much.
Assumed; an idle server keeps less, a desktop with a browser more."""

_TERM_PATTERN = re.compile(r"(?:(\d{1,6})\s*[xX×*]\s*)?([A-Za-z][\w.\- ]*?)")
_CHIP_PATTERN = re.compile(r"(?P<chip>.+?)-(?P<memory>\d{1,6})(?:gb|gib)?")
_MAX_MACHINES = 64
_EXAMPLE = "write for example --hardware '2x m3-ultra-512' or --hardware this"
_THIS = ("this", "localhost")


@dataclass(frozen=True, slots=True)
class NodeMemory:
    """One machine: its memory in bytes, and how fast it reads and computes where that is known.

    ``limit_bytes`` is what MLX may use there; ``limit_mark`` and ``limit_source`` say how it is
    known. Nodes of one name are ranks on one machine and share its limit: see ``share_machines``.
    ``chip`` is an identifier of the catalog, empty for others. Bandwidth is the chip's peak;
    ``gpu_flops_per_second`` counts multiplications and additions in 16-bit floats, as published.
    ``price_usd`` is the last list price of the cheapest configuration with this memory.
    """

    name: str
    memory_bytes: int
    limit_bytes: int
    limit_mark: Mark
    backend: Backend
    limit_source: str = ""
    chip: str = ""
    bandwidth_bytes_per_second: int | None = None
    gpu_flops_per_second: int | None = None
    price_usd: int | None = None


@dataclass(frozen=True, slots=True)
class Chip:
    """An Apple chip as sold: memory options in GiB, peak bandwidth in GB/s per GPU option."""

    identifier: str
    name: str
    year: int
    memory_gib: tuple[int, ...]
    bandwidth_gb_per_second: tuple[int, ...]
    thunderbolt_rdma: bool


@functools.cache
def _table() -> dict[str, Any]:
    return tomllib.loads((Path(__file__).parent / "hardware.toml").read_text(encoding="utf-8"))


@functools.cache
def chips() -> dict[str, Chip]:
    """All chips of the catalog, by identifier such as ``m3-ultra``."""
    return {
        identifier: Chip(
            identifier,
            fields["name"],
            fields["year"],
            tuple(fields["memory_gib"]),
            tuple(fields["bandwidth_gb_per_second"]),
            fields["thunderbolt_rdma"],
        )
        for identifier, fields in _table()["chips"].items()
    }


def apple_gpu_limit(memory_gib: int) -> tuple[int, str]:
    """The GPU limit to assume for an Apple machine that cannot be asked, and where it is from."""
    rules = _table()["gpu_limit"]
    logged = sorted(rules["logged"], key=lambda entry: int(entry["memory_gib"]))
    for entry in logged:
        if entry["memory_gib"] == memory_gib:
            return int(entry["limit_bytes"]), f"logged on {entry['machine']}"
    smaller = [entry for entry in logged if entry["memory_gib"] < memory_gib]
    if not smaller:
        limit = int(memory_gib * GIB * rules["unlogged_share"])
        return limit, "two thirds of memory, as macOS allows on small machines"
    share = smaller[-1]["limit_bytes"] / (smaller[-1]["memory_gib"] * GIB)
    source = f"{share:.0%} of memory, the share logged on {smaller[-1]['machine'].split(';')[0]}"
    return int(memory_gib * GIB * share), source


def parse_hardware(spec: str) -> list[NodeMemory]:
    """Read a specification such as ``2x m3-ultra-512``, ``m3-ultra-512 + m4-max-128``, ``this``.

    Returns:
        One entry per rank. Machines of the catalog get names of their own (``m3-ultra-512/1``);
        ``2x this`` are two ranks on this machine, under one name.

    Raises:
        UsageError: if a term is malformed, counts no machine, or names an unknown chip or memory
            option; the message says what there is.
    """
    counted = [_parse_term(term, spec) for term in spec.split("+")]
    total = sum(count for count, _ in counted)
    if total > _MAX_MACHINES:
        raise UsageError(f"'{spec}' names {total} machines, at most {_MAX_MACHINES} are planned")
    machines = [node for count, node in counted for _ in range(count)]
    numbered: list[NodeMemory] = []
    for index, node in enumerate(machines):
        same = sum(other.name == node.name for other in machines)
        if node.name == _THIS[1] or same == 1:
            numbered.append(node)
        else:
            nth = sum(other.name == node.name for other in machines[: index + 1])
            numbered.append(replace(node, name=f"{node.name}/{nth}"))
    return numbered


def _parse_term(term: str, spec: str) -> tuple[int, NodeMemory]:
    match = _TERM_PATTERN.fullmatch(term.strip())
    if match is None:
        raise UsageError(f"'{spec}' is not a hardware specification", _EXAMPLE)
    count = int(match.group(1)) if match.group(1) else 1
    if count == 0:
        raise UsageError(f"'{term.strip()}' counts no machine", _EXAMPLE)
    name = re.sub(r"[\s_]+", "-", match.group(2).strip().lower())
    return count, this_machine() if name in _THIS else _catalog_machine(name, match.group(2))


def _catalog_machine(name: str, written: str) -> NodeMemory:
    match = _CHIP_PATTERN.fullmatch(name)
    chip = chips().get(match.group("chip") if match else name)
    if chip is None:
        raise UsageError(f"unknown hardware '{written}'", _similar(name))
    options = ", ".join(f"{chip.identifier}-{size}" for size in chip.memory_gib)
    if match is None:
        raise UsageError(f"'{written}' does not say how much memory it has", f"one of {options}")
    size = int(match.group("memory"))
    if size not in chip.memory_gib:
        raise UsageError(f"there is no {chip.name} with {size} GB of memory", f"one of {options}")
    limit, source = apple_gpu_limit(size)
    return NodeMemory(f"{chip.identifier}-{size}", size * GIB, limit, "assumed", "metal", source)


def _similar(name: str) -> str:
    machines = [f"{c.identifier}-{size}" for c in chips().values() for size in c.memory_gib]
    close = difflib.get_close_matches(name, machines, n=3, cutoff=0.6)
    if close:
        return f"did you mean {' or '.join(close)}?"
    return f"known chips: {', '.join(chips())}, each with its memory, as in m3-ultra-512; or this"


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
        info = mx.device_info()
        return NodeMemory(
            name,
            int(info["memory_size"]),
            int(info["max_recommended_working_set_size"]),
            "exact",
            "metal",
            "the device's max_recommended_working_set_size",
        )
    if mx.cuda.is_available():
        total = int(mx.device_info()["total_memory"])
        return NodeMemory(name, total, total, "exact", "cuda", "the device's total memory")
    return _cpu_machine(name, _usable_memory_bytes())


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
