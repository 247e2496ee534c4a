"""Conversion of GGUF's llama architecture to mlx-lm's: names, config, and rows of q and k.

llama.cpp rotates neighbouring rows of a head (0 with 1, 2 with 3); the original and MLX rotate
halves (0 with head/2). The converter of llama.cpp therefore interleaves the rows of q and k, and
this module undoes that. A row is a whole number of blocks, so packed rows can be moved.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from k2cli.errors import K2Error
from k2cli.models.checkpoint import shown
from k2cli.models.gguf.reader import GgufFile, GgufTensor

if TYPE_CHECKING:
    from numpy.typing import NDArray

_LAYER_PARTS = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_TOP_PARTS = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
ROPE_FACTORS = "rope_freqs.weight"
"""RoPE factors of llama 3: not a weight, but another form of the config's ``rope_scaling``."""

_LAYER_PATTERN = re.compile(r"blk\.(\d{1,9})\.(\w+)\.(weight|bias)")
_TOP_PATTERN = re.compile(r"(\w+)\.weight")


@dataclass(frozen=True, slots=True)
class LlamaShape:
    """Sizes of a llama model."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    key_value_heads: int
    head_size: int
    vocabulary: int

    def expected(self, module: str, kind: str) -> tuple[int, ...]:
        """Return the shape that the weight or bias of an MLX module must have."""
        rows, columns = self._matrix(module.rsplit(".", 1)[-1])
        return (rows,) if kind == "bias" or columns == 0 else (rows, columns)

    def _matrix(self, part: str) -> tuple[int, int]:
        queries = self.heads * self.head_size
        keys = self.key_value_heads * self.head_size
        return {
            "q_proj": (queries, self.hidden),
            "k_proj": (keys, self.hidden),
            "v_proj": (keys, self.hidden),
            "o_proj": (self.hidden, queries),
            "gate_proj": (self.intermediate, self.hidden),
            "up_proj": (self.intermediate, self.hidden),
            "down_proj": (self.hidden, self.intermediate),
            "embed_tokens": (self.vocabulary, self.hidden),
            "lm_head": (self.vocabulary, self.hidden),
        }.get(part, (self.hidden, 0))


def llama_shape(file: GgufFile) -> LlamaShape:
    """Read the sizes from the metadata.

    Raises:
        K2Error: if one is missing or invalid, or k2 does not support this variant of llama.
    """
    hidden = _integer(file, "llama.embedding_length")
    heads = _integer(file, "llama.attention.head_count")
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise K2Error(f"{file.path} has no token_embd.weight matrix")
    if _integer(file, "llama.expert_count", 0, minimum=0):
        raise K2Error(f"{file.path} is a mixture of experts, which the importer cannot read yet")
    head_size = _integer(file, "llama.attention.key_length", hidden // heads)
    for key in ("llama.attention.value_length", "llama.rope.dimension_count"):
        if _integer(file, key, head_size) != head_size:
            raise K2Error(f"{file.path}: {key} differs from the head size {head_size}")
    return LlamaShape(
        layers=_integer(file, "llama.block_count"),
        hidden=hidden,
        intermediate=_integer(file, "llama.feed_forward_length"),
        heads=heads,
        key_value_heads=_integer(file, "llama.attention.head_count_kv", heads),
        head_size=head_size,
        vocabulary=embedding.shape[0],
    )


def llama_config(file: GgufFile, shape: LlamaShape, names: Mapping[str, str]) -> dict[str, Any]:
    """Make ``config.json`` without quantization; ``names`` is the result of ``llama_names``."""
    theta = _number(file, "llama.rope.freq_base", 10000.0)
    config: dict[str, Any] = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.key_value_heads,
        "head_dim": shape.head_size,
        "vocab_size": shape.vocabulary,
        "max_position_embeddings": _integer(file, "llama.context_length"),
        "rms_norm_eps": _number(file, "llama.attention.layer_norm_rms_epsilon", 1e-5),
        "rope_theta": theta,
        "rope_scaling": _rope_scaling(file, shape.head_size, theta),
        "attention_bias": "model.layers.0.self_attn.q_proj.bias" in names.values(),
        "mlp_bias": "model.layers.0.mlp.gate_proj.bias" in names.values(),
        "tie_word_embeddings": "output.weight" not in names,
        "hidden_act": "silu",
        "torch_dtype": "float16",
    }
    for name, token in (("bos", "bos_token_id"), ("eos", "eos_token_id")):
        value = file.metadata.get(f"tokenizer.ggml.{name}_token_id")
        if value is not None:
            config[token] = value
    return config


def llama_names(file: GgufFile, shape: LlamaShape) -> dict[str, str]:
    """Map the name of every tensor in the GGUF to mlx-lm's, in the file's order.

    Raises:
        K2Error: if a tensor is unknown, missing, or has the wrong shape.
    """
    names: dict[str, str] = {}
    for tensor in file.tensors.values():
        if tensor.name == ROPE_FACTORS:
            continue
        module, kind = _module(file, tensor, shape)
        expected = shape.expected(module, kind)
        if tensor.shape != expected:
            raise K2Error(
                f"{file.path}: {shown(tensor.name)} has the shape {list(tensor.shape)}, "
                f"its metadata says {list(expected)}"
            )
        names[tensor.name] = f"{module}.{kind}"
    _check_complete(file, shape, names)
    return names


def _module(file: GgufFile, tensor: GgufTensor, shape: LlamaShape) -> tuple[str, str]:
    if match := _LAYER_PATTERN.fullmatch(tensor.name):
        layer, part = int(match[1]), _LAYER_PARTS.get(match[2])
        if part is not None and layer < shape.layers:
            return f"model.layers.{layer}.{part}", match[3]
    elif (match := _TOP_PATTERN.fullmatch(tensor.name)) and match[1] in _TOP_PARTS:
        return _TOP_PARTS[match[1]], "weight"
    raise K2Error(f"{file.path} has the tensor {shown(tensor.name)}, unknown in a llama model")


def _check_complete(file: GgufFile, shape: LlamaShape, names: Mapping[str, str]) -> None:
    needed = ["token_embd.weight", "output_norm.weight"]
    parts = list(_LAYER_PARTS)
    needed += [f"blk.{n}.{part}.weight" for n in range(shape.layers) for part in parts]
    # MLX's llama has biases on all projections of a kind or on none.
    for group in (("attn_q", "attn_k", "attn_v", "attn_output"), tuple(parts[-3:])):
        biases = [f"blk.{n}.{part}.bias" for n in range(shape.layers) for part in group]
        needed += biases if any(name in names for name in biases) else []
    missing = [name for name in needed if name not in names]
    if missing:
        raise K2Error(f"{file.path} lacks {len(missing)} tensors, the first is '{missing[0]}'")


def original_rows(name: str, rows: NDArray[Any], shape: LlamaShape) -> NDArray[Any]:
    """Undo llama.cpp's interleaving of the rows of q and k; return other tensors unchanged.

    Args:
        name: the name of the tensor in the GGUF.
        rows: the data, one row per output, ``[rows, ...]``.
        shape: the model's sizes.
    """
    part = name.split(".")[2] if name.startswith("blk.") else ""
    heads = {"attn_q": shape.heads, "attn_k": shape.key_value_heads}.get(part)
    if heads is None:
        return rows
    pairs = rows.reshape(heads, shape.head_size // 2, 2, *rows.shape[1:])
    return pairs.swapaxes(1, 2).reshape(rows.shape)


def _rope_scaling(file: GgufFile, head_size: int, theta: float) -> dict[str, Any] | None:
    kind = file.metadata.get("llama.rope.scaling.type", "none")
    if kind == "linear":
        factor = _number(file, "llama.rope.scaling.factor", 1.0)
        return {"rope_type": "linear", "type": "linear", "factor": factor}
    if kind != "none":
        raise K2Error(
            f"{file.path} uses the RoPE scaling {shown(kind)}, which k2 cannot import yet"
        )
    factors = file.tensors.get(ROPE_FACTORS)
    return None if factors is None else _llama3_scaling(file, factors, head_size, theta)


def _llama3_scaling(
    file: GgufFile, tensor: GgufTensor, head_size: int, theta: float
) -> dict[str, Any]:
    """Derive llama 3's ``rope_scaling`` from a table of factors, with Meta's constants.

    The rule keeps high frequencies, divides low ones by ``factor``, and interpolates between. The
    factor is the table's largest entry; the table that follows from it must equal the given one.
    """
    import numpy as np

    if tensor.type_name != "F32" or tensor.shape != (head_size // 2,):
        raise K2Error(f"{file.path}: {shown(tensor.name)} is not {head_size // 2} float32 factors")
    table = np.frombuffer(file.data(tensor), "<f4")
    factor, low, high, context = round(float(table.max()), 4), 1.0, 4.0, 8192
    for index, stored in enumerate(table):
        wavelength = 2 * math.pi * theta ** (2 * index / head_size)
        blend = min(1.0, max(0.0, (context / wavelength - low) / (high - low)))
        if not math.isclose(1 / ((1 - blend) / factor + blend), stored, rel_tol=1e-3):
            raise K2Error(f"{file.path} has RoPE factors that are not llama 3's")
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": context,
    }


def _integer(file: GgufFile, key: str, default: int | None = None, minimum: int = 1) -> int:
    value = file.metadata.get(key, default)
    if value is None:
        raise K2Error(f"{file.path} lacks {key}")
    if isinstance(value, bool) or not isinstance(value, int) or not minimum <= value < 2**40:
        raise K2Error(f"{file.path}: {key} must be an integer of at least {minimum}, not {value!r}")
    return value


def _number(file: GgufFile, key: str, default: float) -> float:
    value = file.metadata.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e30:
        raise K2Error(f"{file.path}: {key} must be a positive number, not {value!r}")
    # The file holds float32: 1e-5 must not become 9.999999747378752e-06.
    return float(f"{value:.7g}")
