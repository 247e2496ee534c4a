from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import k2cli
from benchmarks.even_split import even_split
from k2cli.choices import HeadPlacement, Strategy
from k2cli.planning.hardware.machine import MeasuredSpeed, NodeMemory, NodeRates, this_machine
from k2cli.planning.hardware.spec import parse_hardware
from k2cli.planning.speed.constants import fitted_constants
from k2cli.planning.speed.estimate import (
    Band,
    SpeedEstimate,
    predict_speed,
    speed_obstacle,
)
from k2cli.planning.speed.placement_time import prefill_time, stage_of
from k2cli.planning.speed.work import (
    CacheWork,
    LayerWork,
    ModelWork,
    model_work,
    with_own_attention,
)
from k2cli.sharding.placement import Placement, RankPlacement

_MACHINES = ["m3-ultra-512", "m1-ultra-128", "m4-max-128", "m5-max-128", "m1-8"]
SHIPPED = Path(k2cli.__file__).parent / "models" / "configs"
CONFIGS = Path(__file__).resolve().parents[2] / "data" / "configs"


def _config(name: str) -> dict[str, object]:
    found: dict[str, object] = json.loads((CONFIGS / name / "config.json").read_text())
    return found


@functools.cache
def _k2(slices: int = 1, head: HeadPlacement = "replicated") -> ModelWork:
    return model_work(_config("k2-thinking"), slices=slices, head=head)


def _placed(strategy: Strategy, nodes: list[NodeMemory], layers: int) -> Placement:
    ranges = (
        even_split(layers, len(nodes)) if strategy == "pipeline" else [(0, layers)] * len(nodes)
    )
    return Placement(
        strategy,
        tuple(RankPlacement(rank, node.name, ranges[rank]) for rank, node in enumerate(nodes)),
        "sharded" if strategy == "tensor" else "replicated",
    )


def _predict(
    strategy: Strategy,
    hardware: str,
    *,
    transport: str = "jaccl",
    context: int = 1024,
    **more: Any,
) -> SpeedEstimate:
    nodes = parse_hardware(hardware)
    slices = len(nodes) if strategy == "tensor" else 1
    work = _k2(slices)
    placement = _placed(strategy, nodes, len(work.layers))
    found = predict_speed(
        work,
        placement,
        nodes,
        transport=transport,
        context_length=context,
        **more,
    )
    assert found is not None
    return found


def test_the_work_of_k2_is_what_its_config_says() -> None:
    """4 bit, group 64: 32 billion weights for a token, 8 experts of 384, 70,272 B of cache."""
    work = model_work(_config("k2-mlx-4bit"))
    assert len(work.layers) == 61
    assert sum(layer.cache_read(1) for layer in work.layers) == 70_272
    assert work.layers[0].experts == 0
    assert {(layer.experts, layer.experts_per_token) for layer in work.layers[1:]} == {(384, 8)}
    weights = sum(layer.dense_flops + layer.expert_flops for layer in work.layers) / 2
    assert weights + work.head.dense_flops / 2 == pytest.approx(31.7e9, rel=2e-3)
    read = sum(layer.weights_read(1) for layer in work.layers) + work.head.dense_bytes
    assert read == pytest.approx((weights + work.head.dense_flops / 2) * 4.5 / 8, rel=0.02)
    everything = sum(layer.dense_bytes + layer.expert_bytes for layer in work.layers)
    assert work.layers[1].weights_read(10**6) == pytest.approx(
        work.layers[1].dense_bytes + work.layers[1].expert_bytes
    )
    assert everything == pytest.approx(576.3e9, rel=1e-3)
    assert work.collectives == 0


def test_a_tensor_slice_halves_what_is_cut_and_calls_collectives() -> None:
    whole, half = _k2(), _k2(2, "sharded")
    assert half.head.dense_bytes == pytest.approx(whole.head.dense_bytes / 2, rel=1e-3)
    assert half.layers[5].expert_bytes * 2 == whole.layers[5].expert_bytes
    assert half.layers[5].dense_bytes * 2 > whole.layers[5].dense_bytes  # latents are on both
    assert half.layers[5].cache == whole.layers[5].cache
    assert half.collectives == 2 * 61 + 1
    nodes = parse_hardware("2x m3-ultra-512")
    placement = _placed("tensor", nodes, 61)
    with pytest.raises(ValueError, match="cut into 1 slices, expected 2"):
        predict_speed(whole, placement, nodes, transport="jaccl", context_length=1)


def test_k2_on_two_machines_is_predicted_as_published() -> None:
    """15 tok/s by pipeline (mlx-lm), 21.6 by tensor (exo): rows M001 and M005 of the fit's data."""
    pipeline = _predict("pipeline", "2x m3-ultra-512", transport="ring").decode_tokens_per_second
    tensor = _predict("tensor", "2x m3-ultra-512").decode_tokens_per_second
    assert pipeline.low < 15 < pipeline.high
    assert tensor.low < 21.6 < tensor.high
    assert pipeline.expected < tensor.expected


def _bands(estimate: SpeedEstimate) -> list[Band]:
    return [
        estimate.decode_tokens_per_second,
        estimate.prefill_tokens_per_second,
        estimate.time_to_first_token_seconds,
        estimate.aggregate_decode_tokens_per_second,
    ]


@pytest.mark.parametrize("strategy", ["pipeline", "tensor"])
@pytest.mark.parametrize("context", [1, 1024, 131_072])
def test_bands_are_ordered_and_never_wider_than_twice(strategy: Strategy, context: int) -> None:
    estimate = _predict(strategy, "2x m3-ultra-512", context=context, concurrency=4)
    for band in _bands(estimate):
        assert 0 < band.low < band.expected < band.high
        assert band.high / band.low <= 2.000001
    assert estimate.source.startswith("fitted to public measurements, 2026-")


def test_what_makes_it_slower_is_predicted_to() -> None:
    base = _predict("tensor", "2x m3-ultra-512")

    def decode(estimate: SpeedEstimate) -> float:
        return estimate.decode_tokens_per_second.expected

    assert decode(_predict("tensor", "2x m3-ultra-512", context=100_000)) < decode(base)
    assert decode(_predict("tensor", "2x m3-ultra-512:bandwidth=400GB/s")) < decode(base)
    slow = _predict("tensor", "2x m3-ultra-512", collective_seconds=200e-6)
    fast = _predict("tensor", "2x m3-ultra-512", collective_seconds=26e-6)
    assert decode(slow) < decode(base) < decode(fast)
    # A known link leaves less unknown than what has been published of links.
    assert _width(fast.decode_tokens_per_second) < _width(base.decode_tokens_per_second)
    assert decode(_predict("tensor", "2x m3-ultra-512", transport="ring")) < decode(slow)
    # The slowest machine of a tensor group decides; of a pipeline every one counts.
    assert decode(_predict("tensor", "m3-ultra-512 + m1-ultra-128")) < decode(base)
    # Several requests: together faster than one, each slower than alone.
    strategies: tuple[Strategy, ...] = ("pipeline", "tensor")
    for strategy in strategies:
        many = _predict(strategy, "2x m3-ultra-512", concurrency=8)
        alone = decode(many)
        assert alone < many.aggregate_decode_tokens_per_second.expected < 8 * alone
    # The prefill of a chip whose accelerators are known of another one only is a wide guess.
    assert _width(_predict("tensor", "2x m5-ultra-512").prefill_tokens_per_second) == pytest.approx(
        2
    )


def _width(band: Band) -> float:
    return band.high / band.low


def test_terms_add_up_to_a_token() -> None:
    estimate = _predict("pipeline", "2x m3-ultra-512", transport="ring")
    terms = {term.name: term for term in estimate.terms}
    seconds = sum(
        terms[name].value
        for name in (
            "reading",
            "attention over the context",
            "fixed cost of the layers",
            "waiting for messages",
        )
    )
    assert 1 / seconds == pytest.approx(estimate.decode_tokens_per_second.expected)
    assert terms["weights read per token"].value == pytest.approx(34.3e9, rel=0.01)
    assert "72% of 819 GB/s" in terms["bandwidth of each machine"].source


@pytest.mark.parametrize(("context", "published"), [(30_000, 25.0), (146_000, 5.95)])
def test_grouped_queries_after_a_long_context_are_predicted_as_published(
    context: int, published: float
) -> None:
    """mlx-lm issue 763: MiniMax-M2.1 in 4 bit on an M3 Ultra, six query heads to a head of keys."""
    (node,) = parse_hardware("m3-ultra-256")
    config: dict[str, object] = json.loads((SHIPPED / "minimax-m2.5" / "config.json").read_text())
    del config["quantization_config"]
    work = model_work(config | {"quantization": {"bits": 4, "group_size": 64, "mode": "affine"}})
    assert {part.loads for layer in work.layers for part in layer.cache} == {6}
    estimate = predict_speed(
        work, _placed("single", [node], 62), [node], transport="local", context_length=context
    )
    assert estimate is not None
    decode = estimate.decode_tokens_per_second
    assert decode.low <= published <= decode.high
    assert decode.expected < published * 1.5


def test_latent_attention_has_no_loads_of_its_own() -> None:
    assert {part.loads for layer in _k2().layers for part in layer.cache} == {0}


def test_an_unknown_machine_has_no_speed_and_the_reason_names_it() -> None:
    node = dataclasses.replace(this_machine(), bandwidth_bytes_per_second=None)
    work = model_work(_config("k2-mlx-4bit"))
    placement = _placed("single", [node], 61)
    assert predict_speed(work, placement, [node], transport="local", context_length=1) is None
    obstacle = speed_obstacle([node])
    assert obstacle is not None
    assert "memory bandwidth and compute of localhost not known" in obstacle
    assert "k2 bench --calibrate" in obstacle
    assert speed_obstacle(parse_hardware("m6-16")) == (
        "compute (say flops=) of m6-16 not known; measure it there with: k2 bench --calibrate"
    )
    assert speed_obstacle(parse_hardware("m6-16:flops=8T")) is None
    rates = NodeRates(10e9, 1e11, 1e11, 1e11, 1e-4, 1e-4)
    measured = dataclasses.replace(node, measured=MeasuredSpeed(rates, None, "measured today"))
    assert speed_obstacle([measured]) is None
    found = predict_speed(work, placement, [measured], transport="local", context_length=1)
    assert found is not None
    assert found.source == "measured today"


def test_experts_of_a_step_are_those_that_its_tokens_choose() -> None:
    layer = LayerWork(dense_bytes=10, expert_bytes=1000, experts=10, experts_per_token=2)
    assert layer.weights_read(1) == pytest.approx(10 + 200)
    assert layer.weights_read(2) == pytest.approx(10 + 1000 * (1 - 0.8**2))
    work = ModelWork((layer,), LayerWork(0), 2, 0, 1)
    assert work.head.weights_read(3) == 0


def test_windows_and_states_bound_what_is_read() -> None:
    """gpt-oss has layers with a window of 128 tokens; a Mamba's state does not grow."""
    gpt_oss = {
        "model_type": "gpt_oss", "vocab_size": 512, "hidden_size": 64, "num_hidden_layers": 2,
        "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2,
        "head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 128,
    }  # fmt: skip
    layers = model_work(gpt_oss).layers
    reads = sorted(layer.cache_read(10_000) // layer.cache_read(1) for layer in layers)
    assert reads == [128, 10_000]
    assert {layer.experts_per_token for layer in layers} == {2}
    mamba = {
        "model_type": "mamba", "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128,
        "state_size": 16, "num_hidden_layers": 2, "conv_kernel": 4, "use_bias": False,
        "use_conv_bias": True, "time_step_rank": 4,
    }  # fmt: skip
    layer = model_work(mamba).layers[0]
    assert layer.cache_read(1) == layer.cache_read(10_000) > 0
    assert layer.pair_flops == 0


@settings(max_examples=60, deadline=None)
@given(
    strategy=st.sampled_from(["single", "pipeline", "tensor"]),
    machines=st.lists(st.sampled_from(_MACHINES), min_size=1, max_size=4),
    experts=st.sampled_from([0, 16, 384]),
    context=st.integers(1, 200_000),
    concurrency=st.integers(1, 64),
)
def test_more_work_is_never_faster_and_a_faster_machine_never_slower(
    strategy: Strategy, machines: list[str], experts: int, context: int, concurrency: int
) -> None:
    nodes = parse_hardware(" + ".join(machines[:1] if strategy == "single" else machines))
    if strategy == "pipeline" and len(nodes) == 1:
        strategy = "single"
    slices = len(nodes) if strategy == "tensor" else 1
    layer = LayerWork(
        dense_bytes=10**8, expert_bytes=10**9 if experts else 0, experts=experts,
        experts_per_token=4 if experts else 0, dense_flops=4 * 10**8, expert_flops=10**8,
        pair_flops=40_000, decode_pair_flops=140_000, expand_flops=10**7,
        cache=(CacheWork(1152, None),),
    )  # fmt: skip
    work = ModelWork((layer,) * 8, LayerWork(10**9), 14_336, 16 if slices > 1 else 0, slices)
    placement = _placed(strategy, nodes, 8)

    def predict(nodes: list[NodeMemory], context: int) -> SpeedEstimate:
        found = predict_speed(
            work, placement, nodes, transport="ring", context_length=context,
            concurrency=concurrency, prompt_tokens=min(context, 20_000),
        )  # fmt: skip
        assert found is not None
        return found

    base, longer = predict(nodes, context), predict(nodes, 2 * context)
    faster = predict(
        [
            dataclasses.replace(
                node, bandwidth_bytes_per_second=2 * (node.bandwidth_bytes_per_second or 0)
            )
            for node in nodes
        ],
        context,
    )
    slack = 1 + 1e-9
    for band in _bands(base):
        assert 0 < band.low <= band.expected <= band.high <= 2.000001 * band.low
    decode = base.decode_tokens_per_second.expected
    assert longer.decode_tokens_per_second.expected <= decode * slack
    assert decode <= faster.decode_tokens_per_second.expected * slack
    assert (
        base.time_to_first_token_seconds.expected
        <= longer.time_to_first_token_seconds.expected * slack
    )
    assert (
        base.aggregate_decode_tokens_per_second.expected
        <= faster.aggregate_decode_tokens_per_second.expected * slack
    )


@pytest.mark.parametrize(
    ("tokens", "own_ms", "mlx_lm_ms"), [(16, 1.9, 15.3), (50, 4.9, 16.0), (160, 12.7, 17.7)]
)
def test_follow_ups_of_k2_take_what_was_measured(
    tokens: int, own_ms: float, mlx_lm_ms: float
) -> None:
    """Measured on one full-width layer on an H200 after 65,536 tokens."""
    (node,) = parse_hardware("h200-141")
    rates = fitted_constants().rates(node)
    assert rates is not None
    config = _config("k2-mlx-4bit")
    works = [model_work(config)]
    works.append(with_own_attention(works[0], config))
    mlx_lm, own = (
        1e3 * prefill_time(stage_of(work, (30, 31)), rates, tokens, 65_536).attention_seconds
        for work in works
    )
    assert (own, mlx_lm) == pytest.approx((own_ms, mlx_lm_ms), rel=0.25)


def test_a_small_chunk_of_a_prompt_is_absorbed_after_a_long_context() -> None:
    config = _config("k2-mlx-4bit")
    nodes = parse_hardware("2x m3-ultra-512")
    plain = model_work(config)
    placement = _placed("pipeline", nodes, len(plain.layers))

    def seconds(work: ModelWork, chunk: int) -> float:
        found = predict_speed(
            work, placement, nodes, transport="jaccl", context_length=131_072, chunk_tokens=chunk
        )
        assert found is not None
        return found.time_to_first_token_seconds.expected

    own = with_own_attention(plain, config)
    assert seconds(own, 2048) == seconds(plain, 2048)
    assert seconds(own, 32) < 0.5 * seconds(plain, 32)
