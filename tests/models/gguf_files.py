"""Small GGUF files, written with the format's own Python library."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np

HIDDEN, HEADS, KEY_VALUE_HEADS, HEAD, INTERMEDIATE, LAYERS = 256, 4, 2, 64, 512, 2
TOKENS = [*"abcdefgh", "ab", "cd", "<|end|>", "<|tool|>"]

SHAPES = {
    "attn_q": (HEADS * HEAD, HIDDEN),
    "attn_k": (KEY_VALUE_HEADS * HEAD, HIDDEN),
    "attn_v": (KEY_VALUE_HEADS * HEAD, HIDDEN),
    "attn_output": (HIDDEN, HEADS * HEAD),
    "ffn_gate": (INTERMEDIATE, HIDDEN),
    "ffn_up": (INTERMEDIATE, HIDDEN),
    "ffn_down": (HIDDEN, INTERMEDIATE),
}


def interleaved(rows: np.ndarray, heads: int) -> np.ndarray:
    """Reorder rows of q and k like llama.cpp: halves of a head become neighbours."""
    halves = rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
    return halves.swapaxes(1, 2).reshape(rows.shape)


def original_weights(seed: int = 0) -> dict[str, np.ndarray]:
    """Make weights in the original's order, by GGUF's names."""
    random = np.random.default_rng(seed)
    weights = {
        "token_embd.weight": random.normal(size=(len(TOKENS), HIDDEN)),
        "output_norm.weight": 1 + random.normal(size=HIDDEN) / 10,
    }
    for layer in range(LAYERS):
        for part, shape in SHAPES.items():
            weights[f"blk.{layer}.{part}.weight"] = random.normal(size=shape) / 16
        for part in ("attn_norm", "ffn_norm"):
            weights[f"blk.{layer}.{part}.weight"] = 1 + random.normal(size=HIDDEN) / 10
    return {name: weight.astype(np.float32) for name, weight in weights.items()}


def write_llama(
    path: Path,
    weights: dict[str, np.ndarray],
    matrix_type: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    *,
    architecture: str = "llama",
    change: Callable[[gguf.GGUFWriter], None] | None = None,
    tokenizer_model: str = "gpt2",
    pre: str = "smollm",
    tensors_per_file: int = 0,
) -> Path:
    """Write ``weights``, given in the original's order, like llama.cpp's converter."""
    writer = gguf.GGUFWriter(path, architecture, split_max_tensors=tensors_per_file)
    writer.add_block_count(LAYERS)
    writer.add_context_length(1024)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INTERMEDIATE)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KEY_VALUE_HEADS)
    writer.add_rope_dimension_count(HEAD)
    writer.add_rope_freq_base(500000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model(tokenizer_model)
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(TOKENS)
    writer.add_token_types([1] * 10 + [3, 4])
    writer.add_token_merges(["a b", "c d"])
    writer.add_eos_token_id(10)
    if change is not None:
        change(writer)
    for name, weight in weights.items():
        stored = _in_file_order(name, weight)
        if stored.ndim == 2:
            data: Any = gguf.quants.quantize(stored, matrix_type)
            writer.add_tensor(name, data, raw_dtype=matrix_type)
        else:
            writer.add_tensor(name, stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _in_file_order(name: str, weight: np.ndarray) -> np.ndarray:
    if ".attn_q." in name:
        return interleaved(weight, HEADS)
    if ".attn_k." in name:
        return interleaved(weight, KEY_VALUE_HEADS)
    return weight
