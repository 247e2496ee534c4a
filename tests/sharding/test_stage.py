"""Stages of any decoder-layer model give exactly the logits of the whole model."""

from __future__ import annotations

import itertools
from typing import Any

import mlx.core as mx
import pytest

from k2cli.errors import UsageError
from k2cli.sharding.assemble import build
from k2cli.sharding.stage import Stage, cut_stage, make_cache
from k2cli.sharding.trace import parameters
from k2cli.sharding.weights_and_cache import kv_cache_bytes

COMMON = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 256,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama, tied": {"model_type": "llama", "num_hidden_layers": 5, **COMMON},
    "llama, sliding windows": {
        "model_type": "llama",
        "num_hidden_layers": 4,
        "tie_word_embeddings": False,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "sliding_window": 6,
        **COMMON,
    },
    "qwen3": {
        "model_type": "qwen3", "num_hidden_layers": 4, "head_dim": 8, "rope_theta": 1e4,
        "tie_word_embeddings": True, **COMMON,
    },
    "gemma3": {
        "model_type": "gemma3_text", "num_hidden_layers": 7, "head_dim": 8,
        "sliding_window": 6, "sliding_window_pattern": 3, **COMMON,
    },
    "gpt2, two embeddings": {
        "model_type": "gpt2", "n_ctx": 64, "n_embd": 32, "n_head": 4, "n_layer": 4,
        "n_positions": 64, "layer_norm_epsilon": 1e-5, "vocab_size": 96,
        "num_key_value_heads": 4,
    },
    "lfm2, convolutions": {
        "model_type": "lfm2", "num_hidden_layers": 5, "block_dim": 32, "conv_L_cache": 3,
        "conv_bias": False, "norm_eps": 1e-5, "block_ff_dim": 64, "block_multiple_of": 8,
        "block_ffn_dim_multiplier": 1.0, "block_auto_adjust_ff_dim": False,
        "full_attn_idxs": [2, 4], "rope_theta": 1e4, **COMMON,
    },
    "kimi_k2, MLA and experts": {
        "model_type": "kimi_k2", "num_hidden_layers": 4, "moe_intermediate_size": 32,
        "n_shared_experts": 1, "n_routed_experts": 4, "num_experts_per_tok": 2,
        "n_group": 1, "topk_group": 1, "routed_scaling_factor": 1.0,
        "first_k_dense_replace": 1, "q_lora_rank": 16, "kv_lora_rank": 16,
        "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8, **COMMON,
    },
    "exaone4, asks layers for what is inside them": {
        "model_type": "exaone4", "num_hidden_layers": 6, "head_dim": 8, "rope_theta": 1e4,
        "rope_scaling": None, "tie_word_embeddings": False, "sliding_window": 6,
        "sliding_window_pattern": "LLG", **COMMON,
    },
    "llama4, attention in chunks": {
        "model_type": "llama4", "text_config": {
            "model_type": "llama4_text", "num_hidden_layers": 5, "head_dim": 8, "rope_theta": 1e4,
            "rope_scaling": None, "attention_bias": False, "attention_chunk_size": 20,
            "interleave_moe_layer_step": 2, "intermediate_size_mlp": 64, "num_experts_per_tok": 1,
            "num_local_experts": 4, "use_qk_norm": True, **COMMON,
        },
    },
    "gptj, layers called by keyword": {
        "model_type": "gptj", "n_ctx": 64, "n_embd": 32, "n_head": 4, "n_layer": 4,
        "n_positions": 64, "layer_norm_epsilon": 1e-5, "vocab_size": 96, "rotary_dim": 8,
    },
    "phixtral, embedding and head within modules": {
        "model_type": "phixtral", "num_vocab": 96, "model_dim": 32, "num_heads": 4,
        "num_layers": 4, "rotary_dim": 4, "num_local_experts": 4, "num_experts_per_tok": 2,
    },
}  # fmt: skip

TWO_CACHES_A_LAYER = {
    "model_type": "iquestloopcoder", "num_hidden_layers": 3, "head_dim": 8, "loop_num": 2,
    "loop_window_size": 6, "tie_word_embeddings": False, **COMMON,
}  # fmt: skip

TOKENS = [[5, 9, 2, 44, 17, 3, 80, 21, 6, 33], [7], [95], [12]]


def _layer_count(config: dict[str, Any]) -> int:
    names = ("num_hidden_layers", "n_layer", "num_layers")
    text = config.get("text_config", config)
    return int(next(text[name] for name in names if name in text))


def _parameters(config: dict[str, Any]) -> list[tuple[str, mx.array]]:
    mx.random.seed(3)
    values = parameters(build(config))
    return [(name, mx.random.normal(value.shape) * 0.2) for name, value in values.items()]


def _whole(config: dict[str, Any], weights: list[tuple[str, mx.array]]) -> list[mx.array]:
    model = build(config)
    model.load_weights(weights)
    cache = make_cache(model)
    return [model(mx.array([tokens]), cache=cache)[:, -1] for tokens in TOKENS]


def _stages(config: dict[str, Any], weights: Any, bounds: list[int]) -> list[Stage]:
    stages = []
    for first, past_last in itertools.pairwise(bounds):
        model = build(config)
        model.load_weights(weights)
        stages.append(cut_stage(model, first, past_last))
    return stages


def _through(stages: list[Stage]) -> list[mx.array]:
    caches = [stage.make_cache() for stage in stages]
    outputs = []
    for tokens in TOKENS:
        hidden = None
        for stage, cache in zip(stages, caches, strict=True):
            hidden = stage.forward(mx.array([tokens]), cache, hidden)
            mx.eval(hidden)
        assert hidden is not None
        outputs.append(hidden[:, -1])
    return outputs


@pytest.mark.parametrize("name", CONFIGS)
def test_stages_give_the_logits_of_the_whole_model(name: str) -> None:
    config = CONFIGS[name]
    # GatherMM on the CPU needs float32, the type of the random parameters.
    weights = _parameters(config)
    expected = _whole(config, weights)
    count = _layer_count(config)
    for bounds in ([0, 1, count], [0, count - 1, count], [0, 1, 2, 3, count]):
        outputs = _through(_stages(config, weights, bounds))
        for got, wanted in zip(outputs, expected, strict=True):
            assert mx.array_equal(got, wanted), f"{name} cut at {bounds}"


def test_a_whole_model_keeps_more_caches_than_layers() -> None:
    weights = _parameters(TWO_CACHES_A_LAYER)
    expected = _whole(TWO_CACHES_A_LAYER, weights)
    for logits, others in zip(
        expected, _through(_stages(TWO_CACHES_A_LAYER, weights, [0, 3])), strict=True
    ):
        assert mx.array_equal(logits, others)


@pytest.mark.parametrize("name", CONFIGS)
def test_stages_together_hold_every_parameter_once(name: str) -> None:
    config = CONFIGS[name]
    count = _layer_count(config)
    stages = _stages(config, _parameters(config), [0, 2, count])
    first, last = (set(parameters(stage.model)) for stage in stages)
    assert first | last == set(parameters(build(config)))
    # Only an embedding that is also the head may be on both.
    assert all("emb" in key or "wte" in key for key in first & last)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("context", [40, 60])
def test_planned_cache_bytes_are_the_most_that_is_held(name: str, context: int) -> None:
    """Compute a prompt in chunks, with and without an answer's token, in stages of all sizes."""
    config, chunk = CONFIGS[name], 16
    count = _layer_count(config)
    stages = _stages(config, _parameters(config), [0, 1, count])
    most = [dict.fromkeys(range(count), 0) for _ in stages]
    for prompt in (context, context - 1):
        caches = [stage.make_cache() for stage in stages]
        lengths = [min(chunk, prompt - first) for first in range(0, prompt, chunk)]
        for length in [*lengths, *[1] * (context - prompt)]:
            hidden = None
            for stage, cache, seen in zip(stages, caches, most, strict=True):
                hidden = stage.forward(mx.array([[7] * length]), cache, hidden)
                mx.eval(hidden)
                for index, entry in enumerate(stage.local(cache)):
                    seen[index] = max(seen[index], int(entry.nbytes))
    held = [sum(seen.values()) for seen in most]
    assert [kv_cache_bytes(stage, context, chunk) for stage in stages] == held


def test_a_model_without_decoder_layers_is_refused() -> None:
    import mlx.nn as nn

    with pytest.raises(UsageError, match="pipeline"):
        cut_stage(nn.Linear(4, 4), 0, 1)
