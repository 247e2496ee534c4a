"""The activation model against MLX's own peak, on the CPU back end."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import pytest

from k2cli.planning.activation import activation_demand, activation_shape
from k2cli.sharding.architectures import models_module
from k2cli.sharding.assemble import build, cast
from tests.quantization.originals import KIMI, LLAMA

SMALL = {"num_hidden_layers": 3, "vocab_size": 1000, "max_position_embeddings": 65536}
CASES: dict[str, tuple[dict[str, Any], int, int]] = {
    "grouped queries": (
        {**LLAMA, "hidden_size": 256, "num_attention_heads": 8, "num_key_value_heads": 4,
         "intermediate_size": 512}, 256, 1024),
    "wide feed-forward": (
        {**LLAMA, "hidden_size": 512, "num_attention_heads": 8, "num_key_value_heads": 4,
         "intermediate_size": 2048}, 256, 256),
    "latent attention": (
        {**KIMI, "hidden_size": 512, "num_attention_heads": 8}, 256, 1024),
    "many experts": (
        {**KIMI, "hidden_size": 512, "num_attention_heads": 8, "moe_intermediate_size": 512,
         "n_routed_experts": 16, "num_experts_per_tok": 8}, 256, 256),
}  # fmt: skip


def measured_peak(config: dict[str, Any], chunk: int, context: int) -> tuple[int, int]:
    """Peak beside weights and cache while the last chunk is prefilled; and the cache's bytes."""
    model = build(config)
    cast(model, mx.float32)
    mx.eval(model.parameters())
    held = mx.get_active_memory()
    cache = models_module("cache").make_prompt_cache(model)
    for _ in range(0, context, chunk):
        mx.reset_peak_memory()
        model(mx.ones((1, chunk), mx.int32), cache=cache)
        mx.eval([(entry.keys, entry.values) for entry in cache])
    cache_bytes = sum(entry.nbytes for entry in cache)
    return mx.get_peak_memory() - held - cache_bytes, cache_bytes


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_peak_of_prefill_is_near_what_mlx_measures(case: str) -> None:
    config, chunk, context = CASES[case]
    config = {**config, **SMALL}
    peak, cache_bytes = measured_peak(config, chunk, context)
    demand = activation_demand(
        activation_shape(config),
        backend="cpu",
        chunk_tokens=chunk,
        context_length=context,
        concurrency=1,
        itemsize=4,
    )
    growth = cache_bytes // config["num_hidden_layers"]
    assert 0.75 < peak / (demand.peak_bytes + growth) < 1.1


def k2_demand(chunk: int, slices: int) -> int:
    config = {
        "hidden_size": 7168, "num_attention_heads": 64, "kv_lora_rank": 512, "vocab_size": 163840,
        "qk_nope_head_dim": 128, "v_head_dim": 128, "intermediate_size": 18432,
        "moe_intermediate_size": 2048, "n_routed_experts": 384, "num_experts_per_tok": 8,
    }  # fmt: skip
    return activation_demand(
        activation_shape(config), backend="metal", chunk_tokens=chunk, context_length=131_072,
        concurrency=1, itemsize=2, slices=slices,
    ).attention_bytes  # fmt: skip


def test_k2_in_numbers() -> None:
    # The table of published and derived figures: 77.3 GB at once, 38.7 and 12.9 GB by tensor.
    assert k2_demand(2048, 1) == 131_072 * (2 * 64 * 2048 * 2 + 2 * 64 * 256 * 2)
    assert round(k2_demand(2048, 1) / 1e9, 1) == 77.3
    assert round(k2_demand(2048, 2) / 1e9, 1) == 38.7
    assert round(k2_demand(512, 2) / 1e9, 1) == 12.9
