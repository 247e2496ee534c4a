"""Values for configs that the page of architectures is made from: sizes made up, gaps filled.

They stand in where neither k2, transformers nor mlx-lm says what a model type's sizes are, so that
every class of mlx-lm can be built and planned. See benchmarks/architectures.py.
"""

from __future__ import annotations

from typing import Any

LAYERS = 8
"""Number of layers that recorded configs are cut to."""

MADE_UP: dict[str, Any] = {
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
"""Sizes under the names that most architectures give them."""

GUESSES: dict[str, Any] = {
    "mlp_only_layers": [], "decoder_sparse_step": 1, "hidden_dim": 128, "num_kv_reuse_layers": 2,
    "num_heads": 4, "num_kv_heads": 2, "post_norm": False, "qk_norm": True,
    "sliding_window_layers": [1], "conv_window": 2, "group_norm_size": 1, "layer_group_size": 2,
    "is_moe_layer": [False] + [True] * 7, "layer_types": ["full_attention"] * 8,
    "partial_rotary_factor": 0.5, "rotary_emb_base": 10000, "rotary_pct": 0.25, "moe_topk": 2,
    "num_shared_expert": 1, "use_mixed_mlp_moe": False, "use_qk_norm": True, "use_cla": False,
    "cla_share_factor": 2, "linear_attn_config": {
        "full_attn_layers": [4, 8], "kda_layers": [1, 2, 3, 5, 6, 7], "head_dim": 32,
        "num_heads": 4, "short_conv_kernel_size": 4,
    },
    "block_dim": 128, "block_size": 128, "n_kv_heads": 2, "ffn_hidden_size": 256,
    "expert_ffn_hidden_size": 64, "zero_expert_num": 0, "mla_scale_q_lora": True,
    "mla_scale_kv_lora": True, "dim_model_base": 128, "scale_depth": 1.4, "scale_emb": 12.0,
    "shared_intermediate_size": 256, "rotary_dim": 16, "dense_attention_every_n_layers": 2,
    "ff_intermediate_size": 256, "gegelu_limit": 20.0, "a_low_rank_dim": 32, "v_low_rank_dim": 32,
    "gate_low_rank_dim": 32, "decay_low_rank_dim": 32, "num_attention_groups": 2,
    "num_transformer_layers": 4, "model_dim": 128, "ffn_dim_divisor": 8,
    "num_query_heads": [4] * 4, "ffn_multipliers": [2.0] * 4, "hybrid_layer_pattern": [0, 1] * 4,
    "add_swa_attention_sink_bias": False, "add_full_attention_sink_bias": False,
    "sliding_window_size": 64, "swa_num_attention_heads": 4, "swa_num_key_value_heads": 2,
    "swa_head_dim": 32, "swa_v_head_dim": 32, "swa_rope_theta": 10000.0,
    "rope_local_base_freq": 10000.0, "rope_parameters": {"rope_theta": 10000.0},
    "use_sliding_window": False, "rope_traditional": False, "attention_multiplier": 1.0,
    "embedding_multiplier": 1.0, "residual_multiplier": 1.0, "logits_scaling": 1.0,
    "conv_L_cache": 3, "conv_bias": False, "full_attn_idxs": [1, 3], "conv_dim": 128,
    "block_ff_dim": 256, "block_multiple_of": 64, "block_ffn_dim_multiplier": 1.0,
    "block_auto_adjust_ff_dim": False, "rope_scaling": None, "layernorm_num_groups": 1,
    "hidden_act": "silu", "swiglu_limits": None, "num_dense_layers": 1, "use_expert_bias": True,
    "first_k_dense_replace": 1, "model_max_length": 4096, "time_step_limit": [0.001, 0.1],
}  # fmt: skip
"""Values for what a class of mlx-lm demands and neither transformers nor ``MADE_UP`` has."""

PATCHES: dict[str, dict[str, Any]] = {
    "dbrx": {
        "attn_config": {"kv_n_heads": 8, "clip_qkv": 8.0, "rope_theta": 500000.0},
        "rope_theta": None, "rope_parameters": None,
    },
    "deepseek_v2": {
        "rope_parameters": None,
        "num_experts_per_tok": 6, "n_routed_experts": 160, "n_shared_experts": 2,
        "rope_scaling": {
            "beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 0.707,
            "mscale_all_dim": 0.707, "original_max_position_embeddings": 4096, "type": "yarn",
        },
    },
    "exaone4": {"sliding_window_pattern": "LLLG"},
    "gear": {"layer_types": ["full_attention"] * 4},
    "gpt_bigcode": {"n_inner": 8192},
    "granitemoehybrid": {
        "layer_types": ["mamba", "attention"] * 4, "time_step_limit": [0.0, 1e9],
        "mamba_n_heads": 128, "mamba_d_head": 64,
    },
    "hunyuan": {"rope_scaling": {"alpha": 1000.0, "factor": 1.0, "type": "dynamic"}},
    "lfm2": {"full_attn_idxs": [2, 5], "layer_types": None},
    "lfm2_moe": {"full_attn_idxs": [2, 5], "layer_types": None},
    "lfm2-vl": {"text_config": {
        **MADE_UP, "model_type": "lfm2", "full_attn_idxs": [1, 3], "conv_bias": False,
        "conv_L_cache": 3, "block_dim": 128, "block_ff_dim": 256, "block_multiple_of": 64,
        "block_ffn_dim_multiplier": 1.0, "block_auto_adjust_ff_dim": False,
    }},
    "longcat_flash": {"attention_method": "MLA", "zero_expert_type": "identity"},
    "longcat_flash_ngram": {"attention_method": "MLA", "zero_expert_type": "identity"},
    "mamba2": {"time_step_limit": [0.0, 1e9]},
    "mellum": {"num_experts": 64},
    "minicpm3": {"rope_parameters": None, "rope_scaling": {
        "short_factor": [1.0] * 16, "long_factor": [1.0] * 16, "type": "longrope",
        "original_max_position_embeddings": 32768,
    }},
    "nemotron-nas": {"block_configs": [
        {"attention": {"n_heads_in_group": 8}, "ffn": {"ffn_mult": 2.625}},
    ] * LAYERS},
    "openelm": {"num_query_heads": [4] * 4, "num_kv_heads": [2] * 4},
    "phi3small": {"rope_theta": None},
    "plamo": {"num_attention_heads": 16},
    "spark2_5": {"rope_parameters": {
        "full_attention": {"rope_theta": 10000.0, "rope_type": "default"},
        "sliding_attention": {"rope_theta": 10000.0, "rope_type": "default"},
    }},
}  # fmt: skip
"""Values that defaults leave out, or have in a form that mlx-lm does not read."""
