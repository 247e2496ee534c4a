"""The check of a ``config.json`` before it is traced: sizes must be present, whole and plausible.

mlx-lm's argument classes replace missing fields by defaults (a config without ``hidden_size`` would
become a model of 4096) and accept any number, so the fields that decide bytes are checked first.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from k2cli.errors import UsageError
from k2cli.models.config_consistency import CONFIG_HINT, check_quantization
from k2cli.models.json_files import shown

_LAYERS = ("num_hidden_layers", "n_layers", "n_layer", "num_layers")
_WIDTHS = ("hidden_size", "d_model", "n_embd", "dim", "model_dim")
_HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads", "num_query_heads")
_CONTEXTS = (
    "max_position_embeddings", "n_positions", "max_seq_len", "seq_length",
    "model_max_length",  # Kimi Linear
)  # fmt: skip

_LARGEST: Mapping[str, int] = {
    **dict.fromkeys(_LAYERS, 4096),
    **dict.fromkeys(_WIDTHS, 2**20),
    **dict.fromkeys(_HEADS, 2**16),
    **dict.fromkeys(_CONTEXTS, 2**31 - 1),
    **dict.fromkeys(("intermediate_size", "moe_intermediate_size", "n_inner"), 2**22),
    **dict.fromkeys(("ffn_hidden_size", "expert_ffn_hidden_size"), 2**22),
    **dict.fromkeys(("n_routed_experts", "num_experts", "num_local_experts"), 2**16),
    **dict.fromkeys(("n_shared_experts", "num_experts_per_tok", "num_key_value_heads"), 2**16),
    **dict.fromkeys(("head_dim", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"), 2**16),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "sliding_window"), 2**20),
    **dict.fromkeys(("first_k_dense_replace", "moe_layer_freq", "n_group", "topk_group"), 4096),
    "vocab_size": 2**26,
}
"""Integers that decide sizes, with the largest plausible value. The values also limit the time that
tracing can take."""

_MAY_BE_ZERO = frozenset({
    "n_shared_experts", "first_k_dense_replace", "sliding_window", "num_experts",
    "num_experts_per_tok",
})  # fmt: skip
"""0 experts is a dense model; ``models.config_form`` writes null where classes ask for that."""
_ZERO_IN_LISTS = frozenset({"moe_layer_freq"})
"""A single number gives the interval of layers with experts; a list has 0 for layers without."""

_WINDOW_IGNORED = ("mistral", "mixtral", "olmoe", "phi3", "phimoe", "starcoder2")
_WINDOW_ON_REQUEST = (
    "qwen2", "qwen2_moe", "qwen2_vl", "qwen2_5_vl", "qwen3", "qwen3_moe", "smollm3",
)  # fmt: skip
_WINDOW_OF_SOME_LAYERS = ("dots1", "gemma2")
"""Model types with a sliding window whose classes attend to all tokens. Those of the second kind
have one only if ``use_sliding_window`` is true, those of the third unless ``layer_types`` has no
layer with one."""

_REQUIRED: tuple[tuple[str, ...], ...] = (_LAYERS, _WIDTHS, ("vocab_size",))
_LATENT_ATTENTION = ("kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim",
                     "num_attention_heads")  # fmt: skip
_DENSE_WIDTHS = ("intermediate_size", "ffn_hidden_size")
_EXPERTS = (("moe_intermediate_size", "expert_ffn_hidden_size"),
            ("num_experts_per_tok", "moe_topk"))  # fmt: skip
_NUMBERS = ("rope_theta", "rms_norm_eps", "routed_scaling_factor")


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the part that describes the language model: ``text_config`` if there is one."""
    nested = config.get("text_config")
    return nested if isinstance(nested, Mapping) else config


def first_field(config: Mapping[str, Any], names: tuple[str, ...]) -> int | None:
    """Return the first integer among several names that configs use for the same field."""
    for name in names:
        value = config.get(name)
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    return None


def width_field(config: Mapping[str, Any]) -> int | None:
    """Return the width of the hidden states."""
    return first_field(text_config(config), _WIDTHS)


def heads_field(config: Mapping[str, Any]) -> int | None:
    """Return the number of attention heads."""
    return first_field(text_config(config), _HEADS)


def model_context_length(config: Mapping[str, Any]) -> int | None:
    """Return the longest context that the model supports, in tokens; None if not given.

    Some classes of mlx-lm attend to all tokens where the config asks for a sliding window. Up to
    the length of the window both compute the same: it is the longest context of such a model.
    """
    text = text_config(config)
    limits = (first_field(text, _CONTEXTS), _ignored_window(text), _llama4_text_length(config))
    return min((each for each in limits if each), default=None)


def _llama4_text_length(config: Mapping[str, Any]) -> int | None:
    """Return the context up to which mlx-lm's class for Llama 4's language models computes right.

    It attends to all tokens where layers attend to a chunk, and does not scale the queries of
    layers without RoPE, which are the same as long as ``floor_scale`` tokens are not reached.
    """
    if config.get("model_type") != "llama4_text":  # Llama 4 with pictures has another class
        return None
    types, rotated = config.get("layer_types"), config.get("no_rope_layers")
    limits = []
    if isinstance(types, list) and "chunked_attention" in types:
        limits.append(first_field(config, ("attention_chunk_size",)))
    if config.get("attn_temperature_tuning") and isinstance(rotated, list) and not all(rotated):
        limits.append((first_field(config, ("floor_scale",)) or 8192) - 1)
    return min((each for each in limits if each), default=None)


def _ignored_window(text: Mapping[str, Any]) -> int | None:
    """Return the sliding window that mlx-lm's class for this config ignores, or None."""
    window, model_type = first_field(text, ("sliding_window",)), text.get("model_type")
    types = text.get("layer_types")
    if not window:
        return None
    if model_type in _WINDOW_OF_SOME_LAYERS:
        return window if not isinstance(types, list) or "sliding_attention" in types else None
    if model_type in _WINDOW_ON_REQUEST:
        if isinstance(types, list):
            slides = "sliding_attention" in types
        else:
            layers = first_field(text, _LAYERS) or 0
            slides = (first_field(text, ("max_window_layers",)) or 0) < layers
        return window if text.get("use_sliding_window") is True and slides else None
    return window if model_type in _WINDOW_IGNORED and not isinstance(types, list) else None


def check_config(config: Mapping[str, Any], source: str, argument_names: frozenset[str]) -> None:
    """Refuse a config with missing or implausible sizes.

    Args:
        config: the parsed ``config.json``.
        source: its path, for messages.
        argument_names: fields of the architecture's own arguments. If those of latent attention are
            among them, the config must give them.

    Raises:
        UsageError: naming the field and its value.
    """
    text = text_config(config)
    _check_values(config, source)
    if text is not config:
        _check_values(text, f"{source}, text_config")
    for names in _REQUIRED:
        _require_one(text, names, source)
    if "kv_lora_rank" in argument_names:
        for name in _LATENT_ATTENTION:
            _require_one(text, (name,), source)
        _require_one(text, _DENSE_WIDTHS, source)
        if text.get("n_routed_experts") is not None:
            for names in _EXPERTS:
                _require_one(text, names, source)
    _check_experts(text, source)
    check_quantization(config.get("quantization"), source)


def _require_one(text: Mapping[str, Any], names: tuple[str, ...], source: str) -> None:
    """Refuse a config without any of several names for one field; errors name the first."""
    given = [name for name in names if text.get(name) is not None]
    if not given:
        raise UsageError(f"{source} lacks {names[0]}", CONFIG_HINT)
    if isinstance(text[given[0]], list):
        raise UsageError(f"{source}: {given[0]} must be an integer, not {shown(text[given[0]])}")


def _check_values(fields: Mapping[str, Any], source: str) -> None:
    for name, value in fields.items():
        if name in _LARGEST and value is not None:
            _check_integer(name, value, source)
        if name in _NUMBERS and value is not None and not _is_positive_number(value):
            raise UsageError(f"{source}: {name} must be a positive number, not {shown(value)}")


def _check_integer(name: str, value: Any, source: str) -> None:
    if isinstance(value, list):
        # Some architectures give one number per layer.
        if len(value) > _LARGEST[_LAYERS[0]]:
            raise UsageError(f"{source}: {name} has {len(value)} entries")
        for item in value:
            if isinstance(item, list):
                raise UsageError(f"{source}: {name} must hold integers, not {shown(value)}")
            if item != 0 or isinstance(item, bool) or name not in _ZERO_IN_LISTS:
                _check_integer(name, item, source)
        return
    if isinstance(value, bool) or not isinstance(value, int):
        raise UsageError(f"{source}: {name} must be an integer, not {shown(value)}")
    smallest = 0 if name in _MAY_BE_ZERO else 1
    if not smallest <= value <= _LARGEST[name]:
        raise UsageError(
            f"{source}: {name} must be between {smallest} and {_LARGEST[name]}, not {shown(value)}"
        )


def _is_positive_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < 1e30


def _check_experts(text: Mapping[str, Any], source: str) -> None:
    experts = first_field(text, ("n_routed_experts", "num_experts", "num_local_experts"))
    chosen = first_field(text, ("num_experts_per_tok", "num_experts_per_token"))
    if experts is None or chosen is None:
        return
    groups = first_field(text, ("n_group", "num_expert_group"))
    taken = first_field(text, ("topk_group",))
    if experts and groups and experts % groups:
        raise UsageError(f"{source}: {experts} experts make no {groups} groups of equal size")
    if groups and groups > 1 and taken and taken > groups:
        # mlx-lm's classes would take other experts, without an error.
        raise UsageError(f"{source}: topk_group is {taken}, but there are {groups} groups")
    if chosen > experts or (chosen == 0 and experts > 0):
        raise UsageError(f"{source}: num_experts_per_tok is {chosen}, but there are {experts}")
