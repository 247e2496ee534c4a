"""The default context of a launch: the longest that costs neither prefill chunk nor requests."""

from __future__ import annotations

from dataclasses import replace

import pytest

from k2cli.planning.hardware.spec import parse_hardware
from k2cli.planning.planner import Planner
from k2cli.planning.request import PlanRequest
from k2cli.planning.search.candidates import GOOD_CHUNK_TOKENS


@pytest.mark.parametrize(
    ("model", "hardware", "most"),
    [
        ("k2-instruct-4bit", "2x m3-ultra-512", 131_072),
        ("k2-thinking", "2x m3-ultra-512", 262_144),
        ("llama-3.1-8b", "m4-max-128", 131_072),
    ],
)
def test_a_launch_gets_the_longest_context_that_costs_nothing(
    model: str, hardware: str, most: int
) -> None:
    planner, nodes = Planner(model), parse_hardware(hardware)
    request = planner.with_most_sequences(nodes, PlanRequest())
    longest = planner.with_longest_context(nodes, request)
    assert longest.concurrency == request.concurrency
    assert longest.context_length is not None
    plan = planner.plan(nodes, longest, limits=False)
    assert plan.fits
    assert plan.request.prefill_chunk_tokens >= GOOD_CHUNK_TOKENS
    assert 32_768 < longest.context_length <= most
    if longest.context_length < most:  # and any more would cost one of them
        longer = replace(longest, context_length=longest.context_length + 2048)
        plan = planner.plan(nodes, longer, limits=False)
        assert not plan.fits or plan.request.prefill_chunk_tokens < GOOD_CHUNK_TOKENS


def test_where_the_default_does_not_fit_a_shorter_one_is_taken() -> None:
    planner = Planner("llama-3.1-8b")
    weights = planner.model.stored_bytes
    limit = (weights + 2_900_000_000) // 2**30
    nodes = parse_hardware(f"m4-max-128:limit={limit}GiB")
    assert not planner.plan(nodes, PlanRequest(), limits=False).fits
    longest = planner.with_longest_context(nodes, PlanRequest())
    assert longest.context_length is not None
    assert 4096 <= longest.context_length < 32_768
    assert planner.plan(nodes, longest, limits=False).fits


def test_a_model_that_fits_at_no_context_keeps_the_default() -> None:
    nodes = parse_hardware("m4-16")
    assert Planner("k2-instruct-4bit").with_longest_context(nodes, PlanRequest()) == PlanRequest()
