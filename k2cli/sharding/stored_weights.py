"""Differences between what checkpoints store and what a model's class has: heads, copies, packings.

Tools disagree on whether a head that shares the embedding is stored, and some store what the model
computes. Weights that another quantizer packed are refused by its name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from k2cli.errors import UsageError

_LAYER = re.compile(r"(?:^|\.)layers\.(\d{1,6})\.")


def with_stored_head(
    config: Mapping[str, Any], weights: Mapping[str, mx.array]
) -> Mapping[str, Any]:
    """Say that the head is not tied if the config does not say it and a head is stored.

    transformers and mlx-lm differ in what they take for many model types, Llama among them.
    """
    text = config.get("text_config")
    nested = isinstance(text, Mapping)
    said = "tie_word_embeddings" in config or (nested and "tie_word_embeddings" in (text or {}))
    stored = any(name.endswith("lm_head.weight") for name in weights)
    if said or not stored:
        return config
    if isinstance(text, Mapping):
        return {**config, "text_config": {**text, "tie_word_embeddings": False}}
    return {**config, "tie_word_embeddings": False}


def refuse_packed(weights: Mapping[str, mx.array]) -> None:
    """Refuse tensors in the layout of another quantizer, whose settings config.json lacks.

    Raises:
        UsageError: naming the quantizer.
    """
    layouts = ((".g_idx", "GPTQ"), (".qweight", "AWQ or GPTQ"), (".absmax", "bitsandbytes"),
               (".weight_scale_2", "NVIDIA ModelOpt"))  # fmt: skip
    for ending, quantizer in layouts:
        for name in weights:
            if name.endswith(ending):
                raise UsageError(
                    f"the checkpoint is quantized with {quantizer}, as its tensor {name} shows, "
                    "which k2 cannot load",
                    "use an MLX conversion of the model, or its original weights",
                )


def without_copies(
    model: nn.Module, config: Mapping[str, Any], weights: dict[str, mx.array]
) -> dict[str, mx.array]:
    """Leave out what some tools store although the model computes or shares it.

    These are the head of a model that uses its embedding as head, the frequencies of RoPE, and the
    layers after the last one that predict further tokens (of which mlx-lm's DeepSeek knows 61).
    """
    from mlx.utils import tree_flatten

    places = {name for name, _ in tree_flatten(model.parameters())}
    text = config.get("text_config")
    tied = (text if isinstance(text, Mapping) else config).get(
        "tie_word_embeddings", config.get("tie_word_embeddings")
    )

    fields = text if isinstance(text, Mapping) else config
    further = _further_layers(fields)

    def is_copy(name: str) -> bool:
        if name in places:
            return False
        layer = _LAYER.search(name)
        if layer is not None and int(layer[1]) in further:
            return True
        module = name.rpartition(".")[0]
        head = module == "lm_head" or module.endswith(".lm_head")
        return name.endswith("rotary_emb.inv_freq") or (head and tied is True)

    return {name: value for name, value in weights.items() if not is_copy(name)}


def _further_layers(fields: Mapping[str, Any]) -> range:
    """Return the numbers of the layers that predict further tokens."""
    layers, extra = fields.get("num_hidden_layers"), fields.get("num_nextn_predict_layers")
    if not isinstance(layers, int) or not isinstance(extra, int):
        return range(0)
    return range(layers, layers + extra)
