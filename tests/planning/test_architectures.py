"""Every architecture that mlx-lm has either plans, or says in a sentence why not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from k2cli.errors import K2Error
from k2cli.planning.hardware_spec import parse_hardware
from k2cli.planning.planner import make_plan
from k2cli.sharding.architectures import supported_model_types

SMALL: dict[str, Any] = {
    "hidden_size": 128, "num_hidden_layers": 4, "intermediate_size": 256,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 512, "head_dim": 32,
    "rms_norm_eps": 1e-5, "layer_norm_eps": 1e-5, "norm_eps": 1e-5, "layer_norm_epsilon": 1e-5,
    "layernorm_epsilon": 1e-5, "rope_theta": 10000.0, "max_position_embeddings": 4096,
    "tie_word_embeddings": False, "attention_bias": False, "mlp_bias": False,
    "num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "n_routed_experts": 4,
    "n_shared_experts": 1, "num_shared_experts": 1, "moe_intermediate_size": 64,
    "q_lora_rank": 64, "kv_lora_rank": 64, "qk_rope_head_dim": 32, "qk_nope_head_dim": 32,
    "v_head_dim": 32, "first_k_dense_replace": 1, "moe_layer_freq": 1, "n_group": 1,
    "topk_group": 1, "routed_scaling_factor": 1.0, "norm_topk_prob": True,
    "scoring_func": "sigmoid", "topk_method": "noaux_tc", "sliding_window": 64,
    "d_model": 128, "n_layers": 4, "n_heads": 4, "n_layer": 4, "n_embd": 128, "n_head": 4,
    "n_positions": 4096, "n_ctx": 4096, "num_layers": 4,
}  # fmt: skip
"""A config with the sizes that most architectures name; one that needs more must say what."""

PLANNED = {
    "cohere", "cohere2", "deepseek", "deepseek_v3", "deepseek_v32", "gemma", "gemma2", "glm",
    "gpt2", "gpt_oss", "kimi_k2", "llama", "mistral", "mixtral", "olmo2", "olmo3", "phi3",
    "qwen2", "qwen3", "seed_oss", "starcoder2",
}  # fmt: skip
"""Architectures that must plan from these sizes alone."""


@pytest.fixture(scope="module")
def nowhere(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("configs")


@pytest.mark.parametrize("machines", ["m3-ultra-96", "2x m3-ultra-96"])
@pytest.mark.parametrize("model_type", supported_model_types())
def test_it_plans_or_says_why_not(
    nowhere: Path, model_type: str, machines: str, capfd: pytest.CaptureFixture[str]
) -> None:
    (nowhere / "config.json").write_text(json.dumps({**SMALL, "model_type": model_type}))
    plan, refusal = None, None
    try:
        plan = make_plan(str(nowhere), parse_hardware(machines))
    except K2Error as error:
        refusal = error
    if plan is not None:
        assert plan.fits
        assert all(node.weights_bytes > 0 for node in plan.nodes)
    if refusal is not None:
        assert model_type not in PLANNED, refusal.message
        assert refusal.exit_code in (1, 2)
        assert len(refusal.message) > 20
    assert capfd.readouterr().out == ""  # an architecture's own print is not k2's answer
