"""Profiles compared with traced placements: the sums are equal to the byte."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.even_split import even_split
from k2cli.sharding.placement import Placement, RankPlacement
from k2cli.sharding.profile import profile_model
from k2cli.sharding.tensor import StandInGroup, slice_model
from k2cli.sharding.trace import trace_model
from tests.quantization.originals import KIMI, LLAMA
from tests.support.footprints import footprints

CONFIGS: dict[str, dict[str, Any]] = {
    "latent attention and experts": {**KIMI, "num_hidden_layers": 5},
    "quantized": {**KIMI, "quantization": {"group_size": 32, "bits": 4}},
    "grouped queries": {**LLAMA, "num_hidden_layers": 3},
    "tied head": {**LLAMA, "num_hidden_layers": 3, "tie_word_embeddings": True},
    "sliding windows": {
        "model_type": "gemma3_text", "hidden_size": 64, "num_hidden_layers": 7,
        "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2,
        "head_dim": 16, "vocab_size": 96, "sliding_window": 64, "sliding_window_pattern": 3,
        "rms_norm_eps": 1e-6, "max_position_embeddings": 4096,
    },
    "recurrent": {
        "model_type": "mamba2", "hidden_size": 64, "num_hidden_layers": 4, "vocab_size": 96,
        "num_heads": 8, "head_dim": 16, "state_size": 16, "conv_kernel": 4, "n_groups": 1,
        "intermediate_size": 128, "use_bias": False, "use_conv_bias": True,
        "tie_word_embeddings": True, "time_step_limit": [0.0, 1e9], "time_step_rank": "auto",
        "layer_norm_epsilon": 1e-5,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("context_length", [1, 300, 1000])
def test_stages_are_sums_of_the_profile(name: str, context_length: int) -> None:
    config = CONFIGS[name]
    profile = profile_model(trace_model(config, None, "bfloat16"))
    cache = profile.cache_bytes(context_length)
    for stages in (1, 2, 3):
        ranges = even_split(profile.layer_count, stages)
        ranks = tuple(RankPlacement(rank, "node", span) for rank, span in enumerate(ranges))
        placement = Placement("pipeline" if stages > 1 else "single", ranks)
        traced = footprints(
            config, placement, context_length=context_length, concurrency=2, dtype="bfloat16"
        )
        for rank, (first, past_last) in zip(traced, ranges, strict=True):
            assert rank.weights_bytes == profile.weights_bytes(first, past_last)
            assert rank.kv_cache_bytes == 2 * sum(cache[first:past_last])


@pytest.mark.parametrize("name", ["latent attention and experts", "grouped queries"])
@pytest.mark.parametrize("ranks", [2])
def test_slices_are_sums_of_their_profile(name: str, ranks: int) -> None:
    config = CONFIGS[name]
    model = trace_model(config, None, "bfloat16")
    slice_model(config, model, StandInGroup(0, ranks), "sharded")
    profile = profile_model(model)
    whole = (0, profile.layer_count)
    placement = Placement(
        "tensor", tuple(RankPlacement(rank, "node", whole) for rank in range(ranks)), "sharded"
    )
    for traced in footprints(config, placement, context_length=500, dtype="bfloat16"):
        assert traced.weights_bytes == profile.weights_bytes(*whole)
        assert traced.kv_cache_bytes == sum(profile.cache_bytes(500))
