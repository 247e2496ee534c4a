"""Refusal of configs with a statement that changes the result and that the model's class ignores.

mlx-lm's classes take the fields that they know and drop the rest. A fine-tune of Llama with another
activation, or one with capped logits, would load and run with other numbers than its authors meant.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from k2cli.errors import UsageError
from k2cli.models.config_consistency import CONFIG_HINT

_ACTIVATIONS: Mapping[str, tuple[str, ...]] = {
    "silu": ("silu", "swiglu", "switchglu"),
    "swish": ("silu", "swiglu", "switchglu"),
    "gelu": ("gelu", "geglu"),
    "gelu_new": ("gelu", "geglu"), "gelu_fast": ("gelu", "geglu"),
    "gelu_pytorch_tanh": ("gelu", "geglu"), "relu": ("relu",),
    "relu2": ("relu2", "relu_squared", "square"), "sigmoid": ("sigmoid",), "tanh": ("tanh",),
}  # fmt: skip
"""Names of activations in configs, and the words of which one is in the source that computes it."""

_SCORING = re.compile(r"scoring_func: [^=\n]*= ['\"](\w+)['\"]")
_SCORING_USED = re.compile(r"\.scoring_func\b")
_DENSE_LAYERS = (
    "mlp_layer_types", "first_k_dense_replace", "mlp_only_layers", "is_moe_layer",
    "moe_layers_enum", "moe_layer_freq", "num_dense_layers", "first_last_k_dense_replace",
)  # fmt: skip
"""Fields by which classes know which layers have no experts."""
_ACTIVATION_FIELDS = ("hidden_act", "hidden_activation", "activation_function")
_DECLARATION = re.compile(r"^    \w+: .*$", re.MULTILINE)


def _is_one(value: Any, _: Mapping[str, Any]) -> bool:
    return bool(value == 1)


def _is_off(value: Any, _: Mapping[str, Any]) -> bool:
    return value in (None, False, 0)


def _is_causal(value: Any, _: Mapping[str, Any]) -> bool:
    return value in (None, False, "vision")  # Gemma 4: among the tokens of one picture


def _is_head_dim(value: Any, fields: Mapping[str, Any]) -> bool:
    heads = fields.get("num_attention_heads") or 1
    return value in (fields.get("head_dim"), (fields.get("hidden_size") or 0) // heads)


def _is_rotary(value: Any, _: Mapping[str, Any]) -> bool:
    return value not in ("nope", "alibi", "relative_key", "relative_key_query")


def _without_experts(value: Any, fields: Mapping[str, Any]) -> bool:
    return value == 1 or not fields.get("n_routed_experts")


_NEUTRAL: Mapping[str, Callable[[Any, Mapping[str, Any]], bool]] = {
    "alibi": _is_off,
    "attention_multiplier": _is_head_dim,
    "attn_logit_softcapping": _is_off,
    "clip_qkv": _is_off,
    "embedding_multiplier": _is_one,
    "final_logit_softcapping": _is_off,
    "logit_scale": _is_one,
    "logits_scaling": _is_one,
    "parallel_attn": _is_off,
    "position_embedding_type": _is_rotary,
    "query_pre_attn_scalar": _is_head_dim,
    "residual_multiplier": _is_one,
    "routed_scaling_factor": _without_experts,
    "use_alibi": _is_off,
    "use_bidirectional_attention": _is_causal,
}
"""Fields that change the result, each with a test if its value changes nothing. Biases, norms and
numbers of experts are not here: a class without them has no place for their tensors."""

_THETAS_DIFFER: Mapping[str, tuple[float, float]] = {
    "bitnet": (500000.0, 10000.0), "cohere": (500000.0, 8000000.0), "cohere2": (10000.0, 50000.0),
    "exaone_moe": (10000.0, 1000000.0), "glm4_moe_lite": (10000.0, 1000000.0),
    "muse_glimmer_text": (10000.0, 500000.0), "phimoe": (1000000.0, 10000.0),
    "qwen2": (10000.0, 1000000.0), "qwen2_moe": (10000.0, 1000000.0),
    "qwen3_5_moe_text": (10000.0, 100000.0), "qwen3_5_text": (10000.0, 100000.0),
    "smollm3": (2000000.0, 10000.0), "starcoder2": (10000.0, 100000.0),
}  # fmt: skip
"""The theta that transformers and mlx-lm take, by model type, for a config that gives none."""


_FIXED: Mapping[str, Mapping[str, Any]] = {
    "falcon_mamba": {"layer_norm_epsilon": 1e-5},
    "gpt2": {"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False},
    "gpt_bigcode": {"scale_attn_weights": True},
    "gpt_oss": {"swiglu_alpha": 1.702, "swiglu_limit": 7.0},
    "kimi_linear": {"mla_use_nope": True},
    "mamba": {"layer_norm_epsilon": 1e-5},
    "muse_spark": {"residual_gate_temperature": 0.3},
    "muse_spark_text": {"residual_gate_temperature": 0.3},
    "nemotron_h": {"mamba_hidden_act": "silu", "mlp_hidden_act": "relu2"},
    "qwen2_moe": {"decoder_sparse_step": 1, "mlp_only_layers": [], "norm_topk_prob": False},
}
"""Fields whose value is a constant in the class of a model type, and that constant. They are those
that the modelling code of transformers (of Moonshot for Kimi Linear) reads and mlx-lm's does not;
``test_every_field_that_only_transformers_reads_is_known`` compares both."""


def _llama4_layers(fields: Mapping[str, Any]) -> Mapping[str, tuple[Any, list[int]]]:
    """Return Llama 4's lists of layers, each with the one that mlx-lm computes from a number."""
    layers, step = fields.get("num_hidden_layers"), fields.get("interleave_moe_layer_step")
    if not isinstance(layers, int) or not isinstance(step, int) or step < 1:
        return {}
    return {
        "no_rope_layers": (
            fields.get("no_rope_layers"), [int((each + 1) % 4 != 0) for each in range(layers)]
        ),
        "moe_layers": (fields.get("moe_layers"), list(range(step - 1, layers, step))),
    }  # fmt: skip


def check_unread(config: Mapping[str, Any], name: str, source: str) -> None:
    """Refuse a config with a field that changes the result and that its class does not read.

    Args:
        config: the config in standard form.
        name: the name of the class's file, for messages.
        source: the text of that file: a field that occurs in it is read.

    Raises:
        UsageError: naming the field and its value.
    """
    text = config.get("text_config")
    fields = text if isinstance(text, Mapping) else config
    for field, changes_nothing in _NEUTRAL.items():
        value = fields.get(field)
        if value is None or field in source or changes_nothing(value, fields):
            continue
        if not (field.endswith("softcapping") and "softcap" in source):  # a constant in Nanochat
            raise _refusal(field, value, name)
    kinds = fields.get("mlp_layer_types")
    read = any(each in source for each in _DENSE_LAYERS)
    if isinstance(kinds, list) and "dense" in kinds and not read:
        raise _refusal("mlp_layer_types", kinds, name)
    declared = _SCORING.search(source)  # with a default, but not used
    scoring = fields.get("scoring_func")
    other = declared is not None and scoring not in (None, declared[1])
    if other and _SCORING_USED.search(source) is None:
        raise _refusal("scoring_func", scoring, name)
    used = _DECLARATION.sub("", source)  # Nemotron's class declares hidden_act, and ignores it
    for field in _ACTIVATION_FIELDS:
        value = fields.get(field)
        if not isinstance(value, str) or any(each in used for each in _ACTIVATION_FIELDS):
            continue
        words = _ACTIVATIONS.get(value.lower(), (value,))
        if not any(word in source.lower() for word in words):
            raise _refusal(field, value, name)
    _check_fixed(fields, str(fields.get("model_type") or config.get("model_type")), name)
    _check_theta(fields)


def _check_fixed(fields: Mapping[str, Any], model_type: str, name: str) -> None:
    """Refuse a value that differs from the constant in the class."""
    for field, computed in _FIXED.get(model_type, {}).items():
        if fields.get(field) is not None and fields[field] != computed:
            raise _refusal(field, fields[field], name)
    if name == "llama4":
        for field, (value, computed) in _llama4_layers(fields).items():
            if value and value != computed:
                raise _refusal(field, value, name)


def _check_theta(fields: Mapping[str, Any]) -> None:
    defaults = _THETAS_DIFFER.get(str(fields.get("model_type")))
    if defaults is not None and fields.get("rope_theta") is None:
        raise UsageError(
            "config.json lacks rope_theta, for which transformers takes "
            f"{defaults[0]:g} and mlx-lm {defaults[1]:g}",
            CONFIG_HINT,
        )


def _refusal(field: str, value: Any, name: str) -> UsageError:
    return UsageError(
        f"config.json has {field} {value!r}, which mlx-lm's {name} does not compute"[:300],
        "with other numbers the model would answer wrongly: choose a model whose architecture "
        "has it",
    )
