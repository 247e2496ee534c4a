"""The size of a checkpoint as stored, if only its config is known.

An MLX checkpoint has the same size stored and in memory. An original has not: fp8 is dequantized
when it is loaded, and packed int4 (compressed-tensors) has no biases, which MLX adds.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import ceil
from typing import TYPE_CHECKING, Any

from k2cli.choices import Certainty
from k2cli.models.quantization import fp8_block, original_quantization

if TYPE_CHECKING:
    import mlx.nn as nn

_SCALE_BYTES = 4
_SHAPE_ENTRY_BYTES = 8


def stored_bytes_of_config(config: Mapping[str, Any], model: nn.Module) -> tuple[int, Certainty]:
    """Compute the bytes that the checkpoint of a config takes on disk.

    Args:
        config: a checked config.
        model: its traced model, as held in memory, with the checkpoint's float type.
    """
    from k2cli.sharding.trace import parameters

    held = parameters(model)
    original = original_quantization(config)
    if original is None:
        return sum(value.nbytes for value in held.values()), "exact"
    if original.get("quant_method") == "fp8":
        return _fp8_bytes(model, fp8_block(original)), "modelled"
    packed = sum(
        value.nbytes
        for name, value in held.items()
        if not (name.endswith(".biases") and name.removesuffix("biases") + "scales" in held)
    )
    matrices = sum(
        value.size // (value.shape[-1] * value.shape[-2])
        for name, value in held.items()
        if name.endswith(".scales")
    )
    return packed + matrices * _SHAPE_ENTRY_BYTES, "modelled"


def _fp8_bytes(model: nn.Module, block: tuple[int, int]) -> int:
    """Count linear layers with one byte per weight and a float32 scale per block.

    The originals keep the embedding, the head and the router's gate unquantized.
    """
    from mlx.utils import tree_flatten

    total = 0
    for path, module in model.named_modules():
        own = [value for _, value in tree_flatten(module.parameters())]
        if module.children() or not own:
            continue
        name = path.rpartition(".")[2]
        weight = module.get("weight")
        is_matrix = hasattr(module, "to_quantized") and name not in ("embed_tokens", "lm_head")
        total += sum(value.nbytes for value in own)
        if is_matrix and weight is not None:
            *stack, rows, columns = weight.shape
            blocks = ceil(rows / block[0]) * ceil(columns / block[1])
            for count in stack:
                blocks *= count
            total += weight.size + blocks * _SCALE_BYTES - weight.nbytes
    return total
