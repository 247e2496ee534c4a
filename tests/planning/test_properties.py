"""Properties of every plan, with models and machines drawn by hypothesis.

The models are real ones of every kind of cache and layer that plans know, some with fewer layers;
the machines have about as much memory as the model needs, so that some fit and some do not.
"""

from __future__ import annotations

import functools
import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from k2cli.planning.hardware.machine import NodeMemory
from k2cli.planning.hardware.spec import parse_hardware
from k2cli.planning.plan import Plan
from k2cli.planning.planner import Planner
from k2cli.planning.request import PlanRequest

CONFIGS = Path(__file__).resolve().parents[2] / "k2cli" / "models" / "configs"
MODELS: dict[str, dict[str, Any]] = {
    "k2-instruct-4bit": {"num_hidden_layers": 6},
    "deepseek-v3.2": {"num_hidden_layers": 5},
    "gpt-oss-20b": {},
    "qwen3-next-80b": {"num_hidden_layers": 8},
    "llama-3.1-8b": {},
    "k2.5": {"text_config": {"num_hidden_layers": 4}},
}
"""Latent attention, sparse attention, sliding windows, recurrent state, grouped attention, and a
text model inside another; with what is changed in their configs."""

CHIPS = ("m3-ultra-512", "m2-ultra-192", "m4-max-128", "m1-max-64")


@functools.cache
def planner(name: str) -> Planner:
    config = json.loads((CONFIGS / name / "config.json").read_text())
    for field, value in MODELS[name].items():
        config[field] = {**config[field], **value} if isinstance(value, dict) else value
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config))
        return Planner(folder)


def weights(name: str) -> int:
    """Return the bytes of the model's weights, on any machine."""
    request = PlanRequest("single", 256, dtype="bfloat16")
    return planner(name).plan(parse_hardware("m3-ultra-512"), request, limits=False).nodes[
        0
    ].weights_bytes  # fmt: skip


@st.composite
def cases(draw: st.DrawFn) -> tuple[str, tuple[NodeMemory, ...], PlanRequest]:
    """A model, machines that together have 0.6 to 4 times its weights, and a request."""
    name = draw(st.sampled_from(sorted(MODELS)))
    count = draw(st.integers(1, 4))
    room = weights(name) * draw(st.floats(0.6, 4.0)) / count
    nodes = []
    for index in range(count):
        (node,) = parse_hardware(draw(st.sampled_from(CHIPS)))
        # Two ranks may be on one machine; then they are given the same machine.
        shares = index > 0 and draw(st.integers(0, 4)) == 0
        limit = int(room * draw(st.floats(0.4, 1.6)))
        nodes.append(
            nodes[0]
            if shares
            else replace(node, name=f"n{index}", memory_bytes=limit, limit_bytes=limit)
        )
    strategy = "auto" if count == 1 else draw(st.sampled_from(["auto", "auto", "pipeline"]))
    request = PlanRequest(
        strategy,
        draw(st.sampled_from([1, 31, 300, 4096, 8192])) * draw(st.integers(1, 4)),
        concurrency=draw(st.sampled_from([1, 1, 3, 40])),
        dtype="bfloat16",
        free_order=draw(st.booleans()),
    )
    return name, tuple(nodes), request


def planned(name: str, nodes: tuple[NodeMemory, ...], request: PlanRequest) -> Plan:
    return planner(name).plan(nodes, request, limits=False)


many = settings(deadline=None, database=None, max_examples=30)


@many
@given(cases())
def test_layers_and_ledgers_add_up(case: tuple[str, tuple[NodeMemory, ...], PlanRequest]) -> None:
    name, nodes, request = case
    plan = planned(name, nodes, request)
    ranges = [part.layers for part in reversed(plan.placement.ranks)]
    layers = plan.placement.layer_count
    if plan.placement.strategy == "pipeline":
        covered = [layer for first, past_last in ranges for layer in range(first, past_last)]
        assert covered == list(range(layers))
    else:
        assert ranges == [(0, layers)] * len(nodes)
    for node in plan.nodes:
        parts = (
            node.weights_bytes, node.kv_cache_bytes, node.activation_bytes, node.overhead_bytes
        )  # fmt: skip
        assert min(parts) >= 0
        assert node.total_bytes == sum(parts)
        assert node.headroom_bytes == node.limit_bytes - node.total_bytes
    assert plan.fits == all(node.headroom_bytes >= 0 for node in plan.nodes)
    if plan.fits:
        for machine in nodes:
            held = sum(node.total_bytes for node in plan.nodes if node.name == machine.name)
            assert held <= machine.limit_bytes


@many
@given(cases(), st.integers(0, 3), st.floats(1.01, 3.0))
def test_more_memory_never_makes_a_fit_fail(
    case: tuple[str, tuple[NodeMemory, ...], PlanRequest], which: int, factor: float
) -> None:
    name, nodes, request = case
    chosen = nodes[which % len(nodes)]
    limit = int(chosen.limit_bytes * factor)
    larger = tuple(
        replace(node, memory_bytes=limit, limit_bytes=limit) if node == chosen else node
        for node in nodes
    )
    if planned(name, nodes, request).fits:
        assert planned(name, larger, request).fits


@many
@given(cases(), st.integers(1, 20_000), st.integers(0, 30))
def test_more_context_or_sequences_never_need_less(
    case: tuple[str, tuple[NodeMemory, ...], PlanRequest], tokens: int, sequences: int
) -> None:
    name, nodes, request = case
    assert request.context_length is not None
    harder = replace(
        request,
        context_length=request.context_length + tokens,
        concurrency=request.concurrency + sequences,
    )
    if planned(name, nodes, harder).fits:
        assert planned(name, nodes, request).fits
    roomy = tuple(replace(node, limit_bytes=10**15, memory_bytes=10**15) for node in nodes)
    less, more = (
        planned(name, roomy, replace(each, chunk_tokens=256)) for each in (request, harder)
    )
    if less.placement == more.placement:
        for before, after in zip(less.nodes, more.nodes, strict=True):
            assert before.weights_bytes == after.weights_bytes
            assert before.kv_cache_bytes <= after.kv_cache_bytes
            assert before.total_bytes <= after.total_bytes
