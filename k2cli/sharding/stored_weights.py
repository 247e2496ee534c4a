"""Stored weights: their differences from what a model's class has, and the time of their reading.

Tools disagree on whether a head that shares the embedding is stored, and some store what the model
computes. Weights that another quantizer packed are refused by its name.

mlx reads files on a processor's stream, and a GPU that computes with what is read waits for it. On
Metal it does so within a command buffer that is already committed, and macOS ends those after some
five seconds: loading from a USB disk or a busy one fails with ``Caused GPU Timeout Error``
(ml-explore/mlx#3803; ollama/ollama#17998 has the same remedy). So ``FileReads`` reads the tensors
first. On CUDA mlx reads when it submits an operation, and no GPU waits.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from k2cli.errors import UsageError

# mlx tells the graph of lazy arrays only as text. It names each operation by its address, which
# belongs to it alone while the arrays are held.
_READ = re.compile(r'^\{ (\d+) \[label ="Load"', re.MULTILINE)
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


def gpu_waits_for_reads() -> bool:
    """True if a GPU may be ended for waiting until a file is read."""
    return mx.metal.is_available() and mx.default_device() == mx.gpu


class FileReads:
    """The reads of lazily opened tensors, to do those that lazy arrays need.

    Make it before any of the tensors is evaluated.
    """

    def __init__(self, opened: Iterable[mx.array]) -> None:
        self._tensors = {address: tensor for tensor in opened for address in _reads(tensor)}

    def read_for(self, *arrays: mx.array) -> int:
        """Read the tensors that lazy arrays are computed from; return the number read.

        What has been read is held by the arrays alone, until they are evaluated.
        """
        addresses = dict.fromkeys(address for array in arrays for address in _reads(array))
        found = [self._tensors.pop(address) for address in addresses if address in self._tensors]
        mx.eval(found)
        return len(found)


def _reads(array: mx.array) -> list[str]:
    text = io.StringIO()
    mx.export_to_dot(text, array)
    return _READ.findall(text.getvalue())
