"""One form for a ``config.json``, whichever version of whichever tool wrote it.

mlx-lm's classes read fields by name and replace those that they do not find by defaults of their
own. So a config of transformers 5, which keeps RoPE in ``rope_parameters``, builds a model that
runs with other frequencies, without a word. ``standard_config`` writes each statement under every
name that a class of mlx-lm reads it by. Planner, quantizer and ranks get it from ``read_config``.

A statement that is made twice with different values is refused: no rule says which one holds.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from k2cli.models.config_consistency import (
    check_consistency,
    check_long_lists,
    contradiction,
    is_number,
)
from k2cli.models.rope_form import standardize_rope

_TAGGED_FLOATS = {"Infinity": float("inf"), "-Infinity": float("-inf"), "NaN": float("nan")}
"""Floats that JSON has no words for; transformers 5 writes ``{"__float__": "Infinity"}``."""

_ZERO_IS_NONE = (
    "n_shared_experts", "num_shared_experts", "q_lora_rank", "head_dim", "sliding_window",
    "attention_chunk_size", "attn_logit_softcapping", "final_logit_softcapping",
)  # fmt: skip
"""Fields in which 0 means that the model has no such thing; mlx-lm's classes ask for null."""

_EXPERTS = ("n_routed_experts", "num_local_experts")
"""Numbers of experts for which the same holds, unless the config says how many a token uses."""

_NULL_IS_EMPTY = ("mlp_only_layers",)
"""Lists that are null in a config without such layers; mlx-lm's classes look into them."""

_EMPTY_IS_NONE = ("rope_scaling", "rope_parameters", "quantization_config", "quantization")
"""Fields in which an empty object says as much as null."""

_BY_INTERVAL = ("gemma3_text", "cohere2", "exaone4")
"""Model types whose classes read ``sliding_window_pattern`` instead of ``layer_types``."""

_FULL, _SLIDING = "full_attention", "sliding_attention"


def standard_config(config: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Return a config in the form that mlx-lm's classes read; the given one is not changed.

    Applied twice it changes nothing further.

    Args:
        config: the parsed ``config.json``.
        source: its path, for messages.

    Raises:
        UsageError: if it contradicts itself, or a field of RoPE has another type.
    """
    result: dict[str, Any] = _with_floats(copy.deepcopy(dict(config)))
    _standardize(result, source)
    text = result.get("text_config")
    if isinstance(text, dict):
        _standardize(text, f"{source}, text_config")
        if "tie_word_embeddings" in result:
            text.setdefault("tie_word_embeddings", result["tie_word_embeddings"])
    return result


def _with_floats(value: Any) -> Any:
    if isinstance(value, dict):
        if value.keys() == {"__float__"} and value["__float__"] in _TAGGED_FLOATS:
            return _TAGGED_FLOATS[value["__float__"]]
        return {key: _with_floats(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_with_floats(each) for each in value]
    return value


def _standardize(fields: dict[str, Any], source: str) -> None:
    """Bring the fields of one model, the whole config or its ``text_config``, into the form."""
    check_consistency(fields, source)
    for name in _ZERO_IS_NONE:
        if is_number(fields.get(name)) and fields[name] == 0:
            fields[name] = None
    for name in _EXPERTS:
        if fields.get(name) == 0 and not fields.get("num_experts_per_tok"):
            fields[name] = None
    for name in _EMPTY_IS_NONE:
        if fields.get(name) == {}:
            fields[name] = None
    for name in _NULL_IS_EMPTY:
        if name in fields and fields[name] is None:
            fields[name] = []
    if isinstance(fields.get("dtype"), str):
        fields["torch_dtype"] = fields["dtype"]
    _write_pattern(fields)
    _write_dense_layers(fields, source)
    standardize_rope(fields, source)
    check_long_lists(fields, source)


def _write_dense_layers(fields: dict[str, Any], source: str) -> None:
    """Write the first dense layers as a number, too, which transformers 5 gives as a list."""
    kinds = fields.get("mlp_layer_types")
    if not isinstance(kinds, list) or not all(kind in ("dense", "sparse") for kind in kinds):
        return
    only = fields.get("mlp_only_layers")  # Qwen's own, beside a step between sparse layers
    numbers = [number for number, kind in enumerate(kinds) if kind == "dense"]
    if (
        isinstance(only, list)
        and fields.get("decoder_sparse_step") in (None, 1)
        and only != numbers
    ):
        raise contradiction("mlp_only_layers", only, "mlp_layer_types", numbers, source)
    dense = kinds.index("sparse") if "sparse" in kinds else len(kinds)
    if "dense" in kinds[dense:]:
        return  # a class that reads only the number is refused: sharding.unread_fields
    known = fields.setdefault("first_k_dense_replace", dense)
    if known != dense:
        raise contradiction(
            "first_k_dense_replace", known, "mlp_layer_types", f"{dense} dense layers", source
        )


def _write_pattern(fields: dict[str, Any]) -> None:
    """Derive the interval of layers with full attention from ``layer_types``.

    transformers 5 writes only the list; Gemma 3, Cohere 2 and EXAONE 4 read only the interval.
    """
    model_type, types = fields.get("model_type"), fields.get("layer_types")
    if model_type not in _BY_INTERVAL or not isinstance(types, list) or _FULL not in types:
        return
    interval = types.index(_FULL) + 1
    expected = [_FULL if (index + 1) % interval == 0 else _SLIDING for index in range(len(types))]
    if types != expected:
        return
    pattern = "L" * (interval - 1) + "G" if model_type == "exaone4" else interval
    if fields.get("sliding_window_pattern") is None:
        fields["sliding_window_pattern"] = pattern
