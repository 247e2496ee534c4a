"""The catalog of Apple chips: machines as sold, their published speed, and their prices.

``hardware.toml`` holds the data, with its sources. Only the speed of a chip's smaller GPU is
derived here, from its number of cores.
"""

from __future__ import annotations

import functools
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from k2cli.units import GB, GIB


@dataclass(frozen=True, slots=True)
class SoldMachine:
    """A machine as sold: ``price_usd`` is the list price on ``price_date``, None if unknown.

    ``withdrawn`` is the day or month since which it is no longer sold, None if it is sold.
    """

    memory_gib: int
    gpu_cores: int
    machine: str = ""
    price_usd: int | None = None
    price_date: str = ""
    source: str = ""
    withdrawn: str | None = None
    bandwidth_gb_per_second: int | None = None
    note: str = ""


@dataclass(frozen=True, slots=True)
class Chip:
    """An Apple chip: memory options in GiB, and peak bandwidth in GB/s for each GPU option.

    ``gpu_tflops`` is the 16-bit speed of the largest GPU, None if nothing was published.
    ``matrix_speedup`` is the factor that its neural accelerators add for the matrices of a prompt.
    ``thunderbolt`` is the generation of its fastest port; ``thunderbolt_rdma`` is true if JACCL can
    use it.
    """

    identifier: str
    name: str
    year: int
    memory_gib: tuple[int, ...]
    gpu_cores: tuple[int, ...]
    bandwidth_gb_per_second: tuple[int, ...]
    gpu_tflops: float | None
    matrix_speedup: float
    thunderbolt: int | None
    thunderbolt_rdma: bool
    machines: tuple[SoldMachine, ...] = ()
    note: str = ""

    def sold(self, memory_gib: int) -> SoldMachine | None:
        """Return the machine of the catalog with this much memory, if one is listed."""
        return next((each for each in self.machines if each.memory_gib == memory_gib), None)

    def usual_gpu_cores(self, memory_gib: int) -> int:
        """Return the cores of the GPU sold with a memory size; of the largest if none is listed."""
        listed = self.sold(memory_gib)
        return listed.gpu_cores if listed is not None else self.gpu_cores[-1]

    def bandwidth_bytes_per_second(self, gpu_cores: int, memory_gib: int | None = None) -> int:
        """Return the peak memory bandwidth of a GPU option, and of a memory size if it matters."""
        listed = self.sold(memory_gib) if memory_gib is not None else None
        if listed is not None and listed.bandwidth_gb_per_second is not None:
            return listed.bandwidth_gb_per_second * GB
        return self.bandwidth_gb_per_second[self.gpu_cores.index(gpu_cores)] * GB

    def flops_per_second(self, gpu_cores: int) -> int | None:
        """Return published 16-bit operations per second for the matrices of a prompt."""
        if self.gpu_tflops is None:
            return None
        share = gpu_cores / self.gpu_cores[-1]
        return round(self.gpu_tflops * 1e12 * share * self.matrix_speedup)


@functools.cache
def _table() -> dict[str, Any]:
    return tomllib.loads((Path(__file__).parent / "hardware.toml").read_text(encoding="utf-8"))


@functools.cache
def chips() -> dict[str, Chip]:
    """Return all chips of the catalog by identifier, such as ``m3-ultra``."""
    return {name: _chip(name, fields) for name, fields in _table()["chips"].items()}


def _chip(identifier: str, fields: dict[str, Any]) -> Chip:
    cores = tuple(fields["gpu_cores"])
    machines = [{"gpu_cores": cores[-1], **entry} for entry in fields.get("machines", [])]
    return Chip(
        identifier=identifier,
        name=fields["name"],
        year=fields["year"],
        memory_gib=tuple(fields["memory_gib"]),
        gpu_cores=cores,
        bandwidth_gb_per_second=tuple(fields["bandwidth_gb_per_second"]),
        gpu_tflops=fields.get("gpu_tflops"),
        matrix_speedup=fields.get("matrix_speedup", 1.0),
        thunderbolt=fields.get("thunderbolt"),
        thunderbolt_rdma=fields["thunderbolt_rdma"],
        machines=tuple(SoldMachine(**entry) for entry in machines),
        note=fields.get("note", ""),
    )


def never_made(identifier: str) -> str | None:
    """Return an explanation if the chip is one that Apple never made, else None."""
    reason = _table()["never_made"].get(identifier)
    return None if reason is None else str(reason)


def chip_of_device(device_name: str) -> Chip | None:
    """Return the chip of a device name, such as ``Apple M3 Ultra``; None if it is not listed."""
    words = device_name.lower().removeprefix("apple").split()
    return chips().get("-".join(words))


def apple_gpu_limit(memory_gib: int) -> tuple[int, str]:
    """Return the GPU limit to assume for an Apple machine, and the source of the figure."""
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
