"""The predicted speed of a placement: tokens per second as a band, with its terms.

Pure arithmetic over the traced work of the model (``work.py``), the machines' rates, and constants
that were fitted to public measurements (docs/design/speed-model.md) or measured by the owner.

The speed of a collective is unknown before it is measured: 26 and 200 us have both been published
for RDMA over Thunderbolt 5. The default lies between, and the band covers both.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from k2cli.choices import Strategy, WantedTransport
from k2cli.planning.hardware.cards import card_of_chip
from k2cli.planning.hardware.chips import chips
from k2cli.planning.hardware.machine import NodeMemory
from k2cli.planning.speed.constants import LinkRates, SpeedConstants, fitted_constants
from k2cli.planning.speed.exchange import (
    Exchange,
    StageTime,
    exchange_seconds,
    stage_times,
)
from k2cli.planning.speed.placement_time import PlacementTime
from k2cli.planning.speed.work import ModelWork
from k2cli.sharding.placement import Placement

GREATEST_RATIO = 2.0
"""The largest ratio of a band's high to its low; a wider band is of no use to a buyer. If more is
unknown (slow collectives on many layers), the band is cut on both sides alike."""


FOLLOW_UP_TOKENS = 50
"""Tokens of the prompt that are not cached yet, such as a next question or a result of a tool."""


@dataclass(frozen=True, slots=True)
class Band:
    """A figure that is not known exactly; ``low <= expected <= high``, all in the same unit."""

    low: float
    expected: float
    high: float


@dataclass(frozen=True, slots=True)
class SpeedTerm:
    """One part of a prediction, to be shown: ``value`` in ``unit``, and its source."""

    name: str
    value: float
    unit: str
    source: str


@dataclass(frozen=True, slots=True)
class SpeedEstimate:
    """Predicted speed of one placement at one context.

    ``decode_tokens_per_second`` is that of one request alone; the aggregate is of all
    ``concurrency`` requests together. Prefill and time to first token are of one request alone,
    with nothing of its prompt cached. ``exchange_seconds`` is expected for the exchange by which
    placements are compared, ``stages`` has the times of each rank in it. As in ``k2 bench``,
    prefill is the prompt over the time to the first token of its answer. ``source`` names the
    constants.
    """

    decode_tokens_per_second: Band
    prefill_tokens_per_second: Band
    time_to_first_token_seconds: Band
    aggregate_decode_tokens_per_second: Band
    terms: tuple[SpeedTerm, ...]
    source: str = ""
    exchange_seconds: float | None = None
    stages: tuple[StageTime, ...] = ()


def speed_obstacle(
    nodes: Sequence[NodeMemory], constants: SpeedConstants | None = None
) -> str | None:
    """Return the reason if no speed can be predicted for these machines, or None."""
    constants = constants or fitted_constants()
    for node in nodes:
        if constants.rates(node) is not None:
            continue
        missing = [
            f"{name} (say {key}=)" if node.chip else name
            for name, key, value in (
                ("memory bandwidth", "bandwidth", node.bandwidth_bytes_per_second),
                ("compute", "flops", node.gpu_flops_per_second),
            )
            if value is None
        ]
        return (
            f"{' and '.join(missing)} of {node.name} not known; "
            "measure it there with: k2 bench --calibrate"
        )
    return None


def predict_speed(
    work: ModelWork,
    placement: Placement,
    nodes: Sequence[NodeMemory],
    *,
    transport: WantedTransport,
    context_length: int,
    concurrency: int = 1,
    prompt_tokens: int | None = None,
    chunk_tokens: int = 512,
    collective_seconds: float | None = None,
    constants: SpeedConstants | None = None,
    exchange: Exchange | None = None,
) -> SpeedEstimate | None:
    """Predict the speed of a placement; None if ``speed_obstacle`` gives a reason.

    Args:
        work: from ``work.model_work(config, ...)``, cut into as many slices as a tensor placement
            has ranks, else uncut. Tracing it costs a few tenths of a second; this function is
            arithmetic and can be called for many contexts and splits.
        nodes: one per rank, rank 0 first.
        transport: the connection of the ranks, or ``auto``.
        context_length: tokens that are in the cache when a token is generated.
        prompt_tokens: length of the prompt; ``context_length`` if None.
        chunk_tokens: tokens of the prompt per prefill step.
        collective_seconds: seconds of one small collective between the ranks; the transport's
            default if None, and then the band covers what has been published for it.
        constants: fitted ones of the package if None, or calibrated ones.
        exchange: the prompt and answer whose time is wanted too.

    Raises:
        ValueError: if the slices of ``work`` are not those of the placement.
    """
    constants = constants or fitted_constants()
    run = _placement_time(work, placement, nodes, transport, collective_seconds, constants)
    if run is None:
        return None
    prompt = prompt_tokens or context_length
    noise = max((node.measured.deviation for node in nodes if node.measured), default=0.0)
    decode, prefill = (max(spread, noise) for spread in _spreads(constants, nodes))
    first = speed_band(lambda run: run.first_token_seconds(prompt, chunk_tokens), run, prefill)
    return SpeedEstimate(
        speed_band(lambda run: 1 / run.decode_seconds(context_length), run, decode),
        Band(prompt / first.high, prompt / first.expected, prompt / first.low),
        first,
        speed_band(
            lambda run: concurrency / run.round_seconds(context_length, concurrency), run, decode
        ),
        terms=_terms(run, nodes, context_length, _source(constants, nodes)),
        source=_source(constants, nodes),
        exchange_seconds=exchange_seconds(run, exchange, chunk_tokens) if exchange else None,
        stages=stage_times(run, exchange, chunk_tokens) if exchange else (),
    )


def _placement_time(
    work: ModelWork,
    placement: Placement,
    nodes: Sequence[NodeMemory],
    transport: WantedTransport,
    collective_seconds: float | None,
    constants: SpeedConstants,
) -> PlacementTime | None:
    """Combine the placement with the rates of its machines and links; None if one is unknown."""
    slices = placement.size if placement.strategy == "tensor" else 1
    if work.slices != slices:
        raise ValueError(f"work is cut into {work.slices} slices, expected {slices}")
    rates = [constants.rates(node) for node in nodes]
    known = tuple(each for each in rates if each is not None)
    if len(known) != len(rates):
        return None
    link = link_rates(nodes, transport, placement.strategy, collective_seconds, constants)
    return PlacementTime(work, placement, tuple(node.place for node in nodes), known, link)


def _source(constants: SpeedConstants, nodes: Sequence[NodeMemory]) -> str:
    """Name the constants: the package's, or those measured on these machines."""
    return "; ".join(dict.fromkeys(_source_of(constants, node) for node in nodes))


def _source_of(constants: SpeedConstants, node: NodeMemory) -> str:
    if node.measured is not None:
        return node.measured.source
    if node.device != "cuda":
        return constants.source
    if node.chip in constants.cuda.measured:
        return constants.cuda.source
    return f"{constants.cuda.source}, assumed for {node.chip or node.name}"


def _spreads(constants: SpeedConstants, nodes: Sequence[NodeMemory]) -> tuple[float, float]:
    """Return the spreads of decode and prefill: the widest of the machines.

    Wide ones if another chip stands in for the speed of this one: for the neural accelerators of
    M5, and for GPUs of NVIDIA that k2 has not been measured on.
    """
    widest = math.log(GREATEST_RATIO) / 2
    known = chips()
    decode, prefill = [0.0], [0.0]
    for node in nodes:
        if node.measured is not None:
            decode.append(constants.decode_spread)
            prefill.append(constants.prefill_spread)
        elif node.device == "cuda":
            cuda = constants.cuda
            decode.append(cuda.spread if node.chip in cuda.measured else widest)
            prefill.append(cuda.spread if node.chip in cuda.measured else widest)
        else:
            assumed = node.chip in known and known[node.chip].matrix_speedup != 1
            decode.append(constants.decode_spread)
            prefill.append(widest if assumed else constants.prefill_spread)
    return max(decode), max(prefill)


def link_rates(
    nodes: Sequence[NodeMemory],
    transport: WantedTransport,
    strategy: Strategy,
    collective_seconds: float | None = None,
    constants: SpeedConstants | None = None,
) -> LinkRates:
    """Return the rates of the connection of ranks on these machines, one rank per entry."""
    constants = constants or fitted_constants()
    one_machine = len({node.name for node in nodes}) == 1
    if len(nodes) == 1:
        link = constants.links["local"]
    elif all(node.device == "cuda" for node in nodes):
        # Over the ring and MPI every array goes from the GPU to the CPU and back.
        sums = transport == "nccl" or (transport == "auto" and strategy == "tensor")
        link = constants.links[_nccl_link(nodes) if sums else "ring-cuda"]
    elif one_machine:
        link = constants.links["local"]
    elif transport in ("jaccl", "ring", "mpi"):
        link = constants.links[transport]
    else:
        known = chips()
        rdma = all(node.chip in known and known[node.chip].thunderbolt_rdma for node in nodes)
        link = constants.links["jaccl" if rdma else "ring"]
    measured = [node.measured.collective_seconds for node in nodes if node.measured is not None]
    if collective_seconds is None and len(measured) == len(nodes):
        collective_seconds = measured[0]
    if collective_seconds is None:
        return link
    given = collective_seconds
    return LinkRates(given, given, given, link.bytes_per_second)


def _nccl_link(nodes: Sequence[NodeMemory]) -> str:
    """Return the kind of link on which NCCL sums: NVLink, PCIe, or a network between machines.

    GPUs of the catalog are those of one host, unless each is a machine of its own.
    """
    found = (card_of_chip(node.chip) for node in nodes)
    known = [card for card in found if card is not None]
    machines = {node.name for node in nodes if node.gpu is not None}
    if len(machines) > 1 or any(card.unified for card in known):
        return "nccl-network"
    if any(card.nvlink_gb_per_second is None for card in known):
        return "nccl-pcie"
    return "nccl"


def speed_band(figure: Callable[[PlacementTime], float], run: PlacementTime, spread: float) -> Band:
    """Widen the expected value by the errors of the constants and by what is unknown.

    Unknown are the link, and attention over a long context, of which little has been published:
    half and twice the fitted speed.

    Args:
        figure: the speed, or a time, of a run.
        spread: half the band's width for a known link, as a natural logarithm.
    """
    expected = figure(run)
    others = (figure(run.slower()), figure(run.faster()))
    below = spread + math.log(expected / min(expected, *others))
    above = spread + math.log(max(expected, *others) / expected)
    most = math.log(GREATEST_RATIO)
    if below + above > most:
        below, above = (part * most / (below + above) for part in (below, above))
    return Band(expected * math.exp(-below), expected, expected * math.exp(above))


def _terms(
    run: PlacementTime,
    nodes: Sequence[NodeMemory],
    context_length: int,
    source: str,
) -> tuple[SpeedTerm, ...]:
    """Return the parts of a decoded token's time, and of a prompt's."""
    times = run.stages(context_length) if run.is_pipeline else [run.slowest(context_length)]
    work = run.work
    latency = run.link.collective_seconds
    hops = run.placement.size if run.is_pipeline and run.placement.size > 1 else work.collectives
    flops = sum(layer.dense_flops + layer.expert_flops for layer in work.layers) * work.slices
    terms = [
        SpeedTerm("weights read per token", sum(t.weights_bytes for t in times), "B", "traced"),
        SpeedTerm(
            f"cache read per token at {context_length:,} tokens",
            sum(t.cache_bytes for t in times),
            "B",
            "traced",
        ),
        *_bandwidth_terms(run, nodes, source),
        SpeedTerm("reading", sum(t.memory_seconds for t in times), "s", "bytes over bandwidth"),
        SpeedTerm(
            "attention over the context", sum(t.attention_seconds for t in times), "s", source
        ),
        SpeedTerm("fixed cost of the layers", sum(t.fixed_seconds for t in times), "s", source),
        SpeedTerm("messages between ranks per token", float(hops), "", "traced"),
        SpeedTerm("seconds per message", latency, "s", _latency_source(run.link)),
        SpeedTerm("waiting for messages", run.exchange_seconds(1), "s", "product"),
        SpeedTerm("operations per token of a prompt", float(flops), "FLOP", "traced"),
        SpeedTerm(
            f"follow-up of {FOLLOW_UP_TOKENS} tokens at {context_length:,} tokens",
            run.follow_up_seconds(FOLLOW_UP_TOKENS, context_length),
            "s",
            "time to first token if the rest is cached",
        ),
    ]
    return tuple(terms)


def _latency_source(link: LinkRates) -> str:
    low, high = link.collective_seconds_low, link.collective_seconds_high
    if low == high:
        return "given, or measured by k2 bench --calibrate"
    between = f"between {low * 1e6:.0f} and {high * 1e6:.0f} us"
    return f"assumed, {between}; see docs/design/speed-model.md"


def _bandwidth_terms(
    run: PlacementTime, nodes: Sequence[NodeMemory], source: str
) -> list[SpeedTerm]:
    """Return the rates that each machine reaches; machines that are alike share an entry."""
    kinds: dict[tuple[object, ...], list[int]] = {}
    for name in dict.fromkeys(run.machines):
        rank = run.machines.index(name)
        kinds.setdefault((run.rates[rank], nodes[rank].bandwidth_bytes_per_second), []).append(rank)
    terms = []
    for ranks in kinds.values():
        rank = ranks[0]
        each = f"{run.machines[rank]}" if len(ranks) == 1 else "each machine"
        if 1 < len(ranks) < len(run.machines):
            each = f"each {run.machines[rank].partition('/')[0]}"
        peak = nodes[rank].bandwidth_bytes_per_second
        reached = run.rates[rank].read_bytes_per_second
        share = f"{reached / peak:.0%} of {peak / 1e9:.0f} GB/s; " if peak else ""
        terms.append(SpeedTerm(f"bandwidth of {each}", reached, "B/s", share + source))
        compute = run.rates[rank].dense_flops_per_second
        terms.append(SpeedTerm(f"compute of {each}", compute, "FLOP/s", source))
    return terms
