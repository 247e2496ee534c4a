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


def _is_one(value: Any, _: Mapping[str, Any]) -> bool:
    return bool(value == 1)


def _is_off(value: Any, _: Mapping[str, Any]) -> bool:
    return value in (None, False, 0)


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
    for field in _ACTIVATION_FIELDS:
        value = fields.get(field)
        if not isinstance(value, str) or any(each in source for each in _ACTIVATION_FIELDS):
            continue
        words = _ACTIVATIONS.get(value.lower(), (value,))
        if not any(word in source.lower() for word in words):
            raise _refusal(field, value, name)
    _check_theta(fields)


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
