"""The constants of the speed model: the package's, fitted to measurements.

Those of Apple machines are fitted to public measurements, those of NVIDIA's GPUs to k2's own on two
H200s. ``scripts/fit-speed-model`` writes ``constants.toml``; docs/design/speed-model.md shows how
well the constants predict. ``k2 bench --calibrate`` measures the owner's machines instead
(``calibrate.py``).
"""

from __future__ import annotations

import functools
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from k2cli.planning.hardware.machine import NodeMemory, NodeRates

CONSTANTS_FILE = Path(__file__).parent / "constants.toml"


@dataclass(frozen=True, slots=True)
class Shares:
    """The share of a machine's published peaks that is reached, and fixed seconds per layer.

    Chips of two dies (Ultra) reach less of their bandwidth than others. ``rows_share`` is that of
    ``NodeRates``. ``cache_loads`` are the rates of ``NodeRates.load_bytes_per_second`` as multiples
    of the bandwidth; None where they have not been measured.
    """

    bandwidth_one_die: float
    bandwidth_two_dies: float
    dense_compute: float
    expert_compute: float
    attention_compute: float
    dense_layer_seconds: float
    expert_layer_seconds: float
    rows_share: float = 1.0
    cache_loads_one_die: float | None = None
    cache_loads_two_dies: float | None = None


CACHE_LOADS_RANGE = {False: (3.1, 5.2), True: (1.7, 4.5)}
"""The slowest and the fastest loads of keys and values that have been published, as multiples of
the bandwidth, for chips with one die and with two.

One die, M5 Pro: 119 GB/s with eight query heads of 64 to each head of keys (mlx issue 4076); M5
Max: Qwen3.8-27B after 131,072 tokens (mlx-lm PR 1781). Two dies, M3 Ultra: MiniMax-M2.1 after
30,000 and 146,000 tokens, 177 GB of loads in 128 ms (mlx-lm issue 763); Llama 3.1 405B after 1,024
and 65,536, 533 GB in 144 ms (guruswami-ai/mlx-benchmarks). An M1 Ultra had 1.8 (mlx issue 3837)."""


@dataclass(frozen=True, slots=True)
class LinkRates:
    """One kind of connection between ranks: seconds of a small collective, bytes per second.

    ``low`` and ``high`` are the bounds of what has been published for it.
    """

    collective_seconds_low: float
    collective_seconds: float
    collective_seconds_high: float
    bytes_per_second: float


@dataclass(frozen=True, slots=True)
class CudaConstants:
    """Constants of MLX on NVIDIA's GPUs; ``measured`` are the chips that they were fitted to."""

    source: str
    shares: Shares
    measured: tuple[str, ...]
    spread: float


@dataclass(frozen=True, slots=True)
class SpeedConstants:
    """Everything that a prediction needs beside the work and the machines.

    ``decode_spread`` and ``prefill_spread`` are half widths of the bands, as natural logarithms of
    the ratio to the expected value. ``cuda`` are the shares and the spread for GPUs of NVIDIA.
    """

    source: str
    shares: Shares
    links: Mapping[str, LinkRates]
    decode_spread: float
    prefill_spread: float
    cuda: CudaConstants

    def rates(self, node: NodeMemory) -> NodeRates | None:
        """Return the rates of a machine; None if it is neither calibrated nor known."""
        if node.measured is not None:
            return node.measured.rates
        peak, flops = node.bandwidth_bytes_per_second, node.gpu_flops_per_second
        if peak is None or flops is None:
            return None
        shares = self.cuda.shares if node.device == "cuda" else self.shares
        return effective_rates(shares, peak, flops, two_dies=node.chip.endswith("-ultra"))


def effective_rates(shares: Shares, peak: float, flops: float, *, two_dies: bool) -> NodeRates:
    """Turn published peaks (bytes and operations per second) into rates that are reached."""
    share = shares.bandwidth_two_dies if two_dies else shares.bandwidth_one_die
    loads = shares.cache_loads_two_dies if two_dies else shares.cache_loads_one_die
    low, high = CACHE_LOADS_RANGE[two_dies]
    return NodeRates(
        read_bytes_per_second=peak * share,
        dense_flops_per_second=flops * shares.dense_compute,
        expert_flops_per_second=flops * shares.expert_compute,
        attention_flops_per_second=flops * shares.attention_compute,
        dense_layer_seconds=shares.dense_layer_seconds,
        expert_layer_seconds=shares.expert_layer_seconds,
        rows_share=shares.rows_share,
        load_bytes_per_second=None if loads is None else peak * loads,
        load_bytes_per_second_low=None if loads is None else peak * min(low, loads),
        load_bytes_per_second_high=None if loads is None else peak * max(high, loads),
    )


def constants_of_table(table: Mapping[str, Any]) -> SpeedConstants:
    """Read the tables of ``constants.toml``."""
    return SpeedConstants(
        source=f"fitted to public measurements, {table['fitted_on']} (docs/design/speed-model.md)",
        shares=Shares(**table["mlx"]),
        links={name: LinkRates(**fields) for name, fields in table["links"].items()},
        decode_spread=table["band"]["decode_spread"],
        prefill_spread=table["band"]["prefill_spread"],
        cuda=_cuda_of_table(table["cuda"]),
    )


def _cuda_of_table(table: Mapping[str, Any]) -> CudaConstants:
    machines = " and ".join(table["machines"])
    return CudaConstants(
        source=f"fitted to k2's measurements on {machines}, {table['measured_on']}, "
        f"{table['remark']} (docs/design/speed-model.md)",
        shares=Shares(**table["shares"]),
        measured=tuple(table["chips"]),
        spread=table["spread"],
    )


@functools.cache
def fitted_constants() -> SpeedConstants:
    """Return the constants that come with k2."""
    return constants_of_table(tomllib.loads(CONSTANTS_FILE.read_text(encoding="utf-8")))
