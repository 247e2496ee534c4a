"""The quantization that a config states, in words: MLX's own, or that of an original."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any


def original_quantization(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Return the ``quantization_config`` of a checkpoint that MLX did not quantize, if any."""
    if config.get("quantization") is not None:
        return None
    text = config.get("text_config")
    for fields in (config, text if isinstance(text, Mapping) else {}):
        entry = fields.get("quantization_config")
        if isinstance(entry, Mapping):
            return entry
    return None


def describe_quantization(config: Mapping[str, Any]) -> str:
    """Describe a quantization: ``4-bit affine, group 64``, ``fp8, blocks of 128x128``, ``none``."""
    own = config.get("quantization")
    if isinstance(own, Mapping):
        mode = own.get("mode", "affine")
        modules = [value for value in own.values() if isinstance(value, Mapping)]
        group = f"{mode}, group {own.get('group_size')}"
        bits = sorted({bits for each in modules if isinstance(bits := each.get("bits"), int)})
        if len(bits) > 1:  # modules have their own, as with a mixed recipe
            return f"{', '.join(map(str, bits[:-1]))} and {bits[-1]} bit {group}"
        return f"{own.get('bits')}-bit {group}{', mixed' if modules else ''}"
    original = original_quantization(config)
    if original is None:
        return "none"
    if original.get("quant_method") == "fp8":
        return "fp8, blocks of " + "x".join(map(str, fp8_block(original)))
    if original.get("quant_method") == "compressed-tensors":
        return "compressed-tensors " + str(original.get("format", ""))
    return str(original.get("quant_method", "unknown"))


_FLOATS = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}


def short_format(config: Mapping[str, Any]) -> str:
    """Describe the stored weights in a word, for a table: ``4-bit``, ``mxfp4``, ``fp8``, ``bf16``.

    Empty if the config does not say it.
    """
    own = config.get("quantization")
    if isinstance(own, Mapping):
        every = (own, *(value for value in own.values() if isinstance(value, Mapping)))
        bits = sorted({bits for each in every if isinstance(bits := each.get("bits"), int)})
        mode = own.get("mode", "affine")
        if mode != "affine" and isinstance(mode, str):
            return mode
        return f"{'/'.join(map(str, bits))}-bit" if bits else ""
    original = original_quantization(config)
    if original is not None:
        bits = sorted(set(_packed_bits(original)))
        return f"int{bits[0]}" if bits else str(original.get("quant_method", ""))
    text = config.get("text_config")
    for fields in (config, text if isinstance(text, Mapping) else {}):
        kind = fields.get("torch_dtype") or fields.get("dtype")
        if isinstance(kind, str):
            return _FLOATS.get(kind, kind)
    return ""


def _packed_bits(original: Mapping[str, Any]) -> Iterator[int]:
    """Yield the bits of each group of packed integers, as compressed-tensors states them."""
    groups = original.get("config_groups")
    for group in groups.values() if isinstance(groups, Mapping) else ():
        weights = group.get("weights") if isinstance(group, Mapping) else None
        if isinstance(weights, Mapping) and weights.get("type") == "int":
            bits = weights.get("num_bits")
            if isinstance(bits, int):
                yield bits


def fp8_block(original: Mapping[str, Any]) -> tuple[int, int]:
    """Return the rows and columns of weights that share a scale in an fp8 checkpoint."""
    block = original.get("weight_block_size")
    if isinstance(block, list) and len(block) == 2 and all(
        isinstance(side, int) and 0 < side <= 2**20 for side in block
    ):  # fmt: skip
        return block[0], block[1]
    return 128, 128
