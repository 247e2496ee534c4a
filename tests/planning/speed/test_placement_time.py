"""Times of a placement: sums in closed form against adding up chunk by chunk."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.even_split import even_split
from k2cli.planning.hardware.machine import NodeRates
from k2cli.planning.speed.constants import LinkRates
from k2cli.planning.speed.placement_time import (
    CHUNKS_PER_STAGE,
    LEAST_OVERLAP_TOKENS,
    PlacementTime,
    prefill_time,
)
from k2cli.planning.speed.work import CacheWork, LatentChoice, LayerWork, ModelWork
from k2cli.sharding.latent_ways import LatentWidths
from k2cli.sharding.placement import Placement, RankPlacement

LINK = LinkRates(26e-6, 53e-6, 200e-6, 5e9)


@st.composite
def layers(draw: st.DrawFn) -> LayerWork:
    window = draw(st.sampled_from([None, None, 1, 100, 512, 4096]))
    return LayerWork(
        dense_bytes=draw(st.integers(0, 10**9)),
        expert_bytes=draw(st.integers(0, 10**10)),
        experts=draw(st.sampled_from([0, 8, 384])),
        experts_per_token=8,
        dense_flops=draw(st.integers(0, 10**10)),
        pair_flops=draw(st.integers(0, 10**6)),
        decode_pair_flops=draw(st.integers(0, 10**6)),
        expand_flops=draw(st.sampled_from([0, 10**8])),
        latent=draw(st.sampled_from([None, None, LatentChoice(LatentWidths(256, 512), 1.0)])),
        cache=(CacheWork(1000, window),),
        window_tokens=window,
    )


@st.composite
def runs(draw: st.DrawFn) -> PlacementTime:
    """Pipelines and tensor slices on machines of unlike speed, some of which share a machine."""
    ranks = draw(st.integers(1, 4))
    strategy = "single" if ranks == 1 else draw(st.sampled_from(["pipeline", "tensor"]))
    few = draw(st.lists(layers(), min_size=ranks, max_size=6))
    machines = tuple(draw(st.sampled_from("abc")) for _ in range(ranks))
    speeds = st.floats(1e11, 1e13)
    rates = tuple(
        NodeRates(draw(speeds) / 10, draw(speeds), draw(speeds), draw(speeds), 1e-4, 2e-4)
        for _ in range(ranks)
    )
    split = even_split(len(few), ranks) if strategy == "pipeline" else [(0, len(few))] * ranks
    placement = Placement(
        strategy,
        tuple(RankPlacement(rank, name, split[rank]) for rank, name in enumerate(machines)),
    )
    work = ModelWork(tuple(few), LayerWork(10**9), 14_336, 2 * len(few), 1)
    return PlacementTime(work, placement, machines, rates, LINK)


def chunk_by_chunk(run: PlacementTime, prompt_tokens: int, chunk_tokens: int) -> float:
    """Add up the time of a prompt chunk by chunk, as the engine runs it."""
    if run.is_pipeline:
        pieces = CHUNKS_PER_STAGE * run.placement.size
        chunk_tokens = min(
            chunk_tokens, max(LEAST_OVERLAP_TOKENS, math.ceil(prompt_tokens / pieces))
        )
    total = filling = 0.0
    for done in range(0, prompt_tokens, chunk_tokens):
        count = min(chunk_tokens, prompt_tokens - done)
        times = dict.fromkeys(run.machines, 0.0)
        for stage, rates, name in zip(run.parts, run.rates, run.machines, strict=True):
            times[name] += prefill_time(stage, rates, count, done).seconds
        total += max(times.values()) + run.exchange_seconds(count)
        filling = sum(times.values()) - max(times.values())
    return total + (filling if run.is_pipeline else 0.0)


@settings(max_examples=80, deadline=None)
@given(runs(), st.integers(1, 9000), st.sampled_from([32, 100, 512, 2048]))
def test_prefill_is_the_sum_of_its_chunks(run: PlacementTime, tokens: int, chunk: int) -> None:
    assert run.prefill_seconds(tokens, chunk) == pytest.approx(
        chunk_by_chunk(run, tokens, chunk), rel=1e-9
    )
