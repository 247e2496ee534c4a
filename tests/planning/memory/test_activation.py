"""The activation model against MLX's own peak on the CPU, and the page that shows it."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import mlx.core as mx
import pytest

from benchmarks.activation_grid import Grid, Point
from benchmarks.memory_model import (
    PAGE,
    SMALL_BYTES,
    TOLERANCE,
    compared,
    page,
    recordings,
    share_within,
)
from k2cli.mlx_lm_package import mlx_lm_module
from k2cli.planning.memory.prefill import (
    activation_shape,
    prefill_activation,
    shape_of_model,
)
from k2cli.rank.attention.latent import use_own_attention
from k2cli.rank.joined_projections import join_projections
from k2cli.sharding.assemble import build, cast
from k2cli.sharding.latent_ways import LatentSettings
from k2cli.units import MB
from tests.quantization.originals import KIMI, LLAMA

COMMON = {"num_hidden_layers": 3, "vocab_size": 1000, "max_position_embeddings": 65536}
# Other shapes than those that the model was fitted to (benchmarks/data/activation).
SHAPES: dict[str, dict[str, Any]] = {
    "grouped queries": LLAMA
    | {"hidden_size": 384, "num_attention_heads": 6, "num_key_value_heads": 2,
       "intermediate_size": 1024},
    "latent attention": KIMI
    | {"hidden_size": 384, "num_attention_heads": 6, "moe_intermediate_size": 256,
       "n_routed_experts": 8, "num_experts_per_tok": 4},
}  # fmt: skip


@pytest.fixture(scope="module", params=SHAPES)
def grid(request: pytest.FixtureRequest) -> Iterator[Grid]:
    config = SHAPES[request.param] | COMMON
    model = build(config)
    cast(model, mx.float32)
    mx.eval(model.parameters())
    yield Grid(model, config, "cpu", 4)
    mx.clear_cache()


def need_bytes(point: Point) -> int:
    return max(point.modelled_bytes, point.growth_bytes)


@pytest.mark.slow
@pytest.mark.parametrize(("chunk", "context"), [(64, 1024), (256, 1024), (32, 3072)])
def test_peak_of_prefill_is_what_mlx_measures(grid: Grid, chunk: int, context: int) -> None:
    point = grid.prefill(chunk, context)
    assert need_bytes(point) == pytest.approx(point.peak_bytes, rel=TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize("rows", [1, 5])
def test_peak_of_decode_is_what_mlx_measures(grid: Grid, rows: int) -> None:
    point = grid.decode(rows, 1500)
    assert need_bytes(point) == pytest.approx(point.peak_bytes, rel=TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize("kv_bits", [8, 4])
def test_peak_with_a_quantized_cache_is_at_most_what_is_planned(kv_bits: int) -> None:
    # More layers would say no more: keys and values of one are dequantized at a time.
    config = SHAPES["grouped queries"] | COMMON
    model = build(config)
    cast(model, mx.float32)
    mx.eval(model.parameters())
    attention = mlx_lm_module("models.base")
    before = attention.quantized_scaled_dot_product_attention
    try:
        own = Grid(model, config, "cpu", 4, kv_bits)
        points = [own.prefill(chunk, context) for chunk, context in ((32, 3072), (64, 8192))]
        points += [own.decode(rows, 3000) for rows in (1, 5)]
    finally:
        attention.quantized_scaled_dot_product_attention = before
    for point in points:
        # MLX dequantizes keys and values in an order that differs, and with it the peak.
        assert 0.9 <= need_bytes(point) / point.peak_bytes <= 1.4, point


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "chunk", "context"),
    [
        (LatentSettings(1.0), 16, 3072),
        (LatentSettings(1.0, 128), 24, 3072),
        (LatentSettings(0.0, 128), 256, 1024),
        (LatentSettings(0.0, 256), 512, 2048),
    ],
)
def test_peak_of_k2s_own_attention_is_what_mlx_measures(
    settings: LatentSettings, chunk: int, context: int
) -> None:
    config = SHAPES["latent attention"] | COMMON
    model = build(config)
    shape = shape_of_model(config, model)
    cast(model, mx.float32)
    mx.eval(model.parameters())
    own = Grid(model, config, "cpu", 4)
    assert use_own_attention(model, settings) == 3
    point = own.prefill(chunk, context)
    modelled = prefill_activation(
        shape, device="cpu", chunk_tokens=chunk, context_length=context, concurrency=1,
        itemsize=4, settings=settings,
    ).peak_bytes  # fmt: skip
    assert max(modelled, point.growth_bytes) == pytest.approx(point.peak_bytes, rel=TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize("name", SHAPES)
def test_peak_with_joined_projections_is_what_mlx_measures(name: str) -> None:
    config = SHAPES[name] | COMMON
    model = build(config)
    shape = shape_of_model(config, model)
    cast(model, mx.float32)
    mx.eval(model.parameters())
    peaks, modelled = [], []
    for joined in (False, True):
        if joined:
            assert join_projections(model)
            mx.eval(model.parameters())
        peaks.append(Grid(model, config, "cpu", 4).prefill(512, 512).peak_bytes)
        activation = prefill_activation(
            shape, device="cpu", chunk_tokens=512, context_length=512, concurrency=1, itemsize=4,
            joined=joined,
        )  # fmt: skip
        modelled.append(activation.peak_bytes)
    assert modelled == pytest.approx(peaks, rel=TOLERANCE)


def test_recorded_grids_agree_with_the_model_and_the_page() -> None:
    for recording in recordings():
        found = list(compared(recording))
        if recording.get("recurrent") and recording["backend"] == "cuda":
            assert all(point.ratio >= 0.95 for point in found), recording["label"]
            assert share_within(found, SMALL_BYTES) == 1, recording["label"]
            continue
        if recording.get("recurrent"):
            prefill = [point for point in found if point.phase == "prefill"]
            assert share_within(prefill) >= 0.5, recording["label"]
            assert statistics.median(point.ratio for point in prefill) == pytest.approx(1, abs=0.1)
            assert all(0.9 <= point.ratio <= 1.2 for point in prefill), recording["label"]
            # What a decode step takes of these small models is less than a plan could show.
            assert share_within(found, 3 * MB) >= share_within(prefill), recording["label"]
            continue
        assert share_within(found, SMALL_BYTES) == 1, recording["label"]
        # One of 24 points that the fit has not seen is a length that asks for less workspace.
        least = 0.95 if "not fitted" in recording["label"] else 1
        assert share_within(found) >= least, recording["label"]
    assert PAGE.read_text() == page(), "run scripts/memory-model"


def k2_attention_bytes(chunk: int, slices: int, settings: LatentSettings | None = None) -> int:
    config = {
        "hidden_size": 7168, "num_attention_heads": 64, "kv_lora_rank": 512, "vocab_size": 163840,
        "qk_nope_head_dim": 128, "v_head_dim": 128, "intermediate_size": 18432,
        "moe_intermediate_size": 2048, "n_routed_experts": 384, "num_experts_per_tok": 8,
        "qk_rope_head_dim": 64,
    }  # fmt: skip
    return prefill_activation(
        replace(activation_shape(config), own_attention=settings is not None), device="metal",
        chunk_tokens=chunk, context_length=131_072, concurrency=1, itemsize=2, slices=slices,
        settings=settings,
    ).attention_bytes  # fmt: skip


def test_k2_in_numbers() -> None:
    # The table of published and derived figures: 77.3 GB at once, 38.7 and 12.9 GB by tensor.
    assert k2_attention_bytes(2048, 1) == 131_072 * (2 * 64 * 2048 * 2 + 2 * 64 * 256 * 2)
    assert round(k2_attention_bytes(2048, 1) / 1e9, 1) == 77.3
    assert round(k2_attention_bytes(2048, 2) / 1e9, 1) == 38.7
    assert round(k2_attention_bytes(512, 2) / 1e9, 1) == 12.9


def test_blocks_and_absorbed_steps_of_k2_in_numbers() -> None:
    blocks, absorbed = LatentSettings(1.0, 1024), LatentSettings(1.0)
    # Without blocks a chunk of 2,048 is mlx-lm's; one that is absorbed expands nothing.
    assert k2_attention_bytes(2048, 1, absorbed) == k2_attention_bytes(2048, 1)
    assert k2_attention_bytes(128, 1, absorbed) < 0.6 * k2_attention_bytes(128, 1)
    # In blocks it does not depend on the context, and is bounded by that of absorbed steps.
    assert k2_attention_bytes(2048, 1, blocks) < 0.03 * k2_attention_bytes(2048, 1)
    assert k2_attention_bytes(128, 1, blocks) < k2_attention_bytes(128, 1, absorbed)


def test_metal_agrees_with_the_published_series_of_deepseek_v3() -> None:
    """mlx-lm PR 839: peaks of 383.2, 388.3 and 398.6 GB at 4k, 8k and 16k tokens of prompt."""
    shape = activation_shape(
        {
            "hidden_size": 7168, "num_attention_heads": 128, "kv_lora_rank": 512,
            "qk_nope_head_dim": 128, "v_head_dim": 128, "intermediate_size": 18432,
            "moe_intermediate_size": 2048, "n_routed_experts": 256, "num_experts_per_tok": 8,
            "vocab_size": 129280,
        }
    )  # fmt: skip
    cache_bytes_per_token = 61 * 576 * 2

    def attention_and_cache(context: int) -> int:
        activation = prefill_activation(
            shape, device="metal", chunk_tokens=2048, context_length=context, concurrency=1,
            itemsize=2,
        )  # fmt: skip
        return activation.attention_bytes + context * cache_bytes_per_token

    grown = attention_and_cache(16384) - attention_and_cache(4096)
    assert grown == pytest.approx(398.6e9 - 383.2e9, rel=0.02)
