"""Fields for which transformers and mlx-lm take different values if a config lacks them.

Such a config runs in mlx-lm with other numbers than in the library that it was written for, so it
is refused, and the error names the field and both values. The table was made by
``python -m benchmarks.config_defaults`` (docs/measurements/config-forms.md shows it); fields that
only size tensors are in it, too, because a plan of a config alone sees no tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from k2cli.errors import UsageError
from k2cli.models.config_consistency import CONFIG_HINT

_Value = float | str | bool | None

_DEEPSEEK: Mapping[str, tuple[_Value, _Value]] = {
    "first_k_dense_replace": (3, 0), "moe_intermediate_size": (2048, 1407), "n_group": (8, 1),
    "num_experts_per_tok": (8, 1), "num_key_value_heads": (128, 32),
    "routed_scaling_factor": (2.5, 1.0), "topk_group": (4, 1),
}  # fmt: skip

DEFAULTS_DIFFER: Mapping[str, Mapping[str, tuple[_Value, _Value]]] = {
    "afmoe": {
        "moe_intermediate_size": (1408, 1024), "mup_enabled": (False, True),
        "num_dense_layers": (1, 2), "num_experts": (64, 128), "num_experts_per_tok": (6, 8),
        "num_key_value_heads": (16, 4), "num_shared_experts": (2, 1), "route_scale": (1.0, 2.826),
        "sliding_window": (1024, 2048),
    },
    "cohere2": {"num_key_value_heads": ("the number of heads", 8)},
    "deepseek_v3": _DEEPSEEK,
    "deepseek_v32": _DEEPSEEK,
    "ernie4_5_moe": {
        "moe_intermediate_size": (1536, 0), "moe_k": (6, 1), "moe_layer_start_index": (1, 0),
        "moe_num_shared_experts": (2, 0),
    },
    "falcon_h1": {
        "attention_out_multiplier": (1.0, 0.9375), "embedding_multiplier": (1.0, 5.65685),
        "key_multiplier": (1.0, 0.390625), "lm_head_multiplier": (1.0, 0.0390625),
        "mamba_d_head": ("the state space's width by its heads", 64), "mamba_d_ssm": (1024, 1536),
        "mamba_d_state": (256, 128), "mamba_n_heads": (128, 24),
        "mamba_norm_before_gate": (True, False), "num_key_value_heads": (8, 2),
        "ssm_in_multiplier": (1.0, 1.25), "ssm_out_multiplier": (1.0, 0.2357),
    },
    "gemma2": {"query_pre_attn_scalar": (256, 144.0)},
    "gemma3_text": {"num_key_value_heads": (4, 1), "sliding_window": (4096, 512)},
    "gemma4_text": {
        "final_logit_softcapping": (None, 30.0), "num_key_value_heads": (4, 1),
        "num_kv_shared_layers": (0, 20), "use_double_wide_mlp": (False, True),
    },
    "glm": {"attention_bias": (True, False)},
    "granitemoehybrid": {"position_embedding_type": (None, "rope")},
    "internlm3": {"num_key_value_heads": (2, "the number of heads")},
    "kimi_linear": {
        "num_experts_per_token": (8, 1), "num_shared_experts": (1, 0),
        "routed_scaling_factor": (2.446, 1.0),
    },
    "mimo_v2_flash": {"attention_value_scale": (0.707, None)},
    "ministral3": {"num_key_value_heads": (8, "the number of heads")},
    "mistral": {"num_key_value_heads": (8, "the number of heads")},
    "nanochat": {"num_key_value_heads": ("the number of heads", 10)},
    "phimoe": {"rms_norm_eps": (1e-5, 1e-6)},
    "qwen3_next": {"norm_topk_prob": (True, False)},
    "seed_oss": {"attention_bias": (True, False)},
    "smollm3": {"num_key_value_heads": (4, "the number of heads")},
    "step3p5": {"moe_router_scaling_factor": (1.0, 3.0), "sliding_window": (None, 512)},
}  # fmt: skip
"""By model type and field: the default of transformers, and that of mlx-lm."""

SAME_CLASS: Mapping[str, str] = dict.fromkeys(
    ("kimi_k2", "kimi_k25", "kimi_vl", "joyai_llm_flash"), "deepseek_v3"
)
"""Types that transformers has no class for, and the type whose class mlx-lm takes for them."""

_OF_EXPERTS = frozenset({
    "first_k_dense_replace", "moe_intermediate_size", "n_group", "topk_group", "moe_k",
    "num_experts_per_tok", "num_experts_per_token", "routed_scaling_factor", "norm_topk_prob",
    "num_shared_experts", "num_dense_layers", "route_scale", "moe_layer_start_index",
    "moe_num_shared_experts", "moe_router_scaling_factor",
})  # fmt: skip
_EXPERTS = ("n_routed_experts", "num_experts", "num_local_experts", "moe_num_experts")


def check_defaults(config: Mapping[str, Any]) -> None:
    """Refuse a config without a field whose two defaults differ.

    Args:
        config: the config in standard form. A field that is null counts as given.

    Raises:
        UsageError: naming the field and both defaults.
    """
    text = config.get("text_config")
    fields = text if isinstance(text, Mapping) else config
    dense = not any(fields.get(name) for name in _EXPERTS)
    model_type = str(fields.get("model_type") or config.get("model_type"))
    other = SAME_CLASS.get(model_type)
    owner = f"{other} of transformers" if other else "transformers"
    for name, (theirs, ours) in DEFAULTS_DIFFER.get(other or model_type, {}).items():
        if name in fields or (dense and name in _OF_EXPERTS):
            continue
        raise UsageError(
            f"config.json lacks {name}, for which {owner} takes {_shown(theirs)} and mlx-lm "
            f"{_shown(ours)}",
            CONFIG_HINT,
        )


def _shown(value: _Value) -> str:
    return "none" if value is None else str(value)
