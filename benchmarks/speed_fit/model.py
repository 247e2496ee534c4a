"""The constants to fit, and the predictions of the speed model for a case."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from benchmarks.speed_fit.rows import CHUNK_TOKENS, Observation
from k2cli.planning.speed.constants import LinkRates, Shares, effective_rates
from k2cli.planning.speed.estimate import Band, speed_band
from k2cli.planning.speed.placement_time import PlacementTime

SHARES = (
    "bandwidth_one_die",
    "bandwidth_two_dies",
    "dense_compute",
    "expert_compute",
    "attention_compute",
    "dense_layer_seconds",
    "expert_layer_seconds",
    "cache_loads_one_die",
    "cache_loads_two_dies",
)
ENGINES = ("mlx", "llama.cpp")
COLLECTIVE = "jaccl.collective_seconds"


@dataclass(frozen=True, slots=True)
class Prior:
    """Prior of a constant: its value before any measurement, and its uncertainty.

    ``spread`` is the standard deviation of its logarithm.
    """

    value: float
    spread: float


# Written down before the fit. They keep constants in place that a few rows cannot tell apart; each
# weighs no more than one row that is known to a few percent.
_SHARE_PRIORS = {
    "bandwidth_one_die": Prior(0.8, 0.3),
    "bandwidth_two_dies": Prior(0.7, 0.3),
    "dense_compute": Prior(0.7, 0.3),
    "expert_compute": Prior(0.5, 0.4),
    "attention_compute": Prior(0.5, 0.7),
    "dense_layer_seconds": Prior(80e-6, 0.7),
    "expert_layer_seconds": Prior(110e-6, 0.7),
    # Unlike the others, chosen on 2026-11-29 with the rows of long contexts in view, after other
    # forms of the model had been tried on them. One die: 190 of an M5 Pro's 307 GB/s with eight
    # query heads to each head of keys (mlx issue 4076). Two dies: the middle of
    # ``CACHE_LOADS_RANGE``, which comes from two of the sources of these rows.
    "cache_loads_one_die": Prior(4.95, 0.3),
    "cache_loads_two_dies": Prior(2.8, 0.3),
}
COLLECTIVE_RANGE = (26e-6, 200e-6)
"""Seconds of a small all-reduce over RDMA on Thunderbolt 5, both published: 26 us by
https://github.com/guruswami-ai/mlx-benchmarks (KIMI_K3_TP4.md); 150 us, of 1 MiB, by
https://github.com/pytorch/pytorch/pull/181087; 200 us is the slowest
that is to be reckoned with."""

PRIORS: Mapping[str, Prior] = {
    **{f"{engine}.{name}": prior for engine in ENGINES for name, prior in _SHARE_PRIORS.items()},
    COLLECTIVE: Prior(math.sqrt(COLLECTIVE_RANGE[0] * COLLECTIVE_RANGE[1]), 0.5),
}

ENGINE_OF = {name: "llama.cpp" if name.startswith("llama.cpp") else "mlx" for name in PRIORS}

# Not fitted: no row tells them. TCP over Thunderbolt: about 300 us a round trip
# (https://www.jeffgeerling.com/blog/2025/15-tb-vram-on-mac-studio-rdma-over-thunderbolt-5).
# Bytes per second: 1 MiB reductions over RDMA (4.96 GB/s, guruswami-ai as above; 7.08 GB/s,
# pytorch as above); half of that over TCP, assumed. ``local`` is between processes of one machine.
# Links between NVIDIA's GPUs are in ``cuda.py``.
LINKS: Mapping[str, LinkRates] = {
    "local": LinkRates(10e-6, 30e-6, 100e-6, 5e9),
    "jaccl": LinkRates(COLLECTIVE_RANGE[0], math.nan, COLLECTIVE_RANGE[1], 5e9),
    "ring": LinkRates(200e-6, 300e-6, 400e-6, 2.5e9),
    "mpi": LinkRates(200e-6, 300e-6, 400e-6, 2.5e9),
}

Constants = Mapping[str, float]


def shares_of(constants: Constants, engine: str) -> Shares:
    """The shares of one engine."""
    return Shares(**{name: constants[f"{engine}.{name}"] for name in SHARES})


def link_of(constants: Constants, backend: str) -> LinkRates:
    """A kind of link; the expected latency of RDMA is fitted."""
    link = LINKS[backend]
    if backend != "jaccl":
        return link
    low, high = COLLECTIVE_RANGE
    return LinkRates(low, min(max(constants[COLLECTIVE], low), high), high, link.bytes_per_second)


def run_of(one: Observation, constants: Constants) -> PlacementTime:
    """The case as the planner would see it."""
    rates = effective_rates(
        shares_of(constants, one.engine),
        one.peak_bytes_per_second,
        one.peak_flops_per_second,
        two_dies=one.two_dies,
    )
    ranks = len(one.run.rates)
    return replace(one.run, rates=(rates,) * ranks, link=link_of(constants, one.backend))


def uses(one: Observation, name: str) -> bool:
    """Return False for a constant of other machines or links than the case's."""
    if name == COLLECTIVE:
        return one.backend == "jaccl" and len(one.run.rates) > 1
    return not name.endswith("_one_die" if one.two_dies else "_two_dies")


def predicted(one: Observation, constants: Constants) -> float:
    """Tokens per second."""
    return _speed(one, run_of(one, constants))


def predicted_band(one: Observation, constants: Constants, spread: float) -> Band:
    """Tokens per second, as ``plan-memory`` gives them."""
    return speed_band(lambda run: _speed(one, run), run_of(one, constants), spread)


def _speed(one: Observation, run: PlacementTime) -> float:
    if one.quantity == "decode":
        return one.concurrency / run.round_seconds(one.context_length, one.concurrency)
    chunk = CHUNK_TOKENS[one.engine]
    if one.engine == "mlx":  # mlx-lm counts until the first token, as k2 bench does
        return one.prompt_tokens / run.first_token_seconds(one.prompt_tokens, chunk)
    return one.prompt_tokens / run.prefill_seconds(one.prompt_tokens, chunk)


def errors(rows: Sequence[Observation], constants: Constants) -> list[float]:
    """Natural logarithms of predicted over published."""
    return [math.log(predicted(one, constants) / one.value) for one in rows]
