"""A toy of Kimi K2: the real ``kimi_k2`` architecture, vocabulary format and chat format, small.

Its answers are meaningless but reproducible. Tests and trials use it because the real model would
need a terabyte. Weights are drawn at random in packed form, so nothing is rounded and
the file needs neither mlx nor much time. Activations are meant to be float32 (scales are).
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from k2cli.errors import UsageError
from k2cli.models.files import folder_being_made
from k2cli.models.safetensors_writer import TensorSpec, write_safetensors
from lab.toy_k2.template import CHAT_TEMPLATE
from lab.toy_k2.vocabulary import (
    VOCABULARY_SIZE,
    ranks_file,
    special_id,
    toy_ranks,
    toy_tokenizer_config,
)

if TYPE_CHECKING:
    import numpy
    from numpy.typing import NDArray

_LOGIT_SPREAD = 6.0
"""Standard deviation of the logits: wide enough that the best two are hardly ever close."""


@dataclass(frozen=True, slots=True)
class ToyShape:
    """Sizes of the toy. Every input size must be a multiple of ``group_size``; ``bits`` of None
    leaves all weights float32, as an original to quantize. The tokenizer has ``VOCABULARY_SIZE``
    tokens, whatever the ``vocabulary`` of embedding and head.
    """

    layers: int = 5
    hidden: int = 256
    heads: int = 8
    experts: int = 16
    experts_per_token: int = 4
    q_lora: int = 64
    kv_lora: int = 64
    rope: int = 32
    nope: int = 32
    value: int = 32
    dense_intermediate: int = 512
    expert_intermediate: int = 128
    bits: int | None = 4
    group_size: int = 32
    vocabulary: int = VOCABULARY_SIZE

    def __post_init__(self) -> None:
        if self.layers < 2 or self.experts < self.experts_per_token or self.heads < 1:
            raise UsageError(
                "a toy needs at least 2 layers, 1 head, and as many experts as a token is routed to"
            )
        if self.bits not in (None, 2, 4, 8) or self.group_size not in (32, 64, 128):
            raise UsageError("a toy has 2, 4 or 8 bits in groups of 32, 64 or 128")
        inputs = {
            "hidden": self.hidden, "q_lora": self.q_lora, "kv_lora": self.kv_lora,
            "nope": self.nope, "heads * value": self.heads * self.value,
            "dense_intermediate": self.dense_intermediate,
            "expert_intermediate": self.expert_intermediate,
        }  # fmt: skip
        for name, size in inputs.items():
            if size < 1 or size % self.group_size:
                raise UsageError(
                    f"{name} = {size} is not a multiple of the group size {self.group_size}"
                )


@dataclass(frozen=True, slots=True)
class Matrix:
    """A module's weight ``[..., outputs, inputs]``; its deviation is ``gain / sqrt(inputs)``."""

    name: str
    shape: tuple[int, ...]
    gain: float = 1.0


def build_toy_k2(folder: Path, shape: ToyShape | None = None, seed: int = 0) -> Path:
    """Write a toy checkpoint into ``folder``, which must not exist, and return it.

    The same shape and seed give the same bytes on every machine.

    Raises:
        K2Error: if the folder exists or cannot be written.
    """
    shape = shape or ToyShape()
    documents = {
        "config.json": toy_config(shape),
        "generation_config.json": {
            "bos_token_id": special_id("[BOS]"),
            "eos_token_id": special_id("<|im_end|>"),
        },
        "tokenizer_config.json": toy_tokenizer_config(),
    }
    plan = list(toy_tensors(shape))
    with folder_being_made(folder) as temporary:
        for name, document in documents.items():
            text = json.dumps(document, indent=1) + "\n"
            (temporary / name).write_text(text, encoding="utf-8")
        (temporary / "tiktoken.model").write_bytes(ranks_file(toy_ranks()))
        (temporary / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
        specs = [spec for part in plan for spec in _specs(part, shape)]
        arrays = (array for part in plan for array in _arrays(part, shape, seed))
        write_safetensors(temporary, specs, arrays)
    return folder


def toy_config(shape: ToyShape) -> dict[str, Any]:
    """K2's config with the toy's sizes; everything that is not a size is K2's own."""
    config: dict[str, Any] = {
        "model_type": "kimi_k2",
        "architectures": ["DeepseekV3ForCausalLM"],
        "vocab_size": shape.vocabulary,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.dense_intermediate,
        "moe_intermediate_size": shape.expert_intermediate,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.heads,
        "n_shared_experts": 1,
        "n_routed_experts": shape.experts,
        "num_experts_per_tok": shape.experts_per_token,
        "q_lora_rank": shape.q_lora,
        "kv_lora_rank": shape.kv_lora,
        "qk_rope_head_dim": shape.rope,
        "qk_nope_head_dim": shape.nope,
        "v_head_dim": shape.value,
        "routed_scaling_factor": 2.827,
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "norm_topk_prob": True,
        "n_group": 1,
        "topk_group": 1,
        "moe_layer_freq": 1,
        "first_k_dense_replace": 1,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-6,
        "rope_theta": 50000.0,
        "rope_scaling": {
            "beta_fast": 1.0,
            "beta_slow": 1.0,
            "factor": 32.0,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "original_max_position_embeddings": 4096,
            "type": "yarn",
        },
        "attention_bias": False,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "bos_token_id": special_id("[BOS]"),
        "eos_token_id": special_id("[EOS]"),
    }
    if shape.bits is not None:
        config["quantization"] = {
            "group_size": shape.group_size,
            "bits": shape.bits,
            "mode": "affine",
        }
    return config


def toy_tensors(shape: ToyShape) -> Iterator[Matrix | TensorSpec]:
    """Every parameter: quantizable matrices, and tensors that stay float32."""
    yield Matrix("model.embed_tokens", (shape.vocabulary, shape.hidden), math.sqrt(shape.hidden))
    for layer in range(shape.layers):
        prefix = f"model.layers.{layer}"
        yield TensorSpec(f"{prefix}.input_layernorm.weight", "F32", (shape.hidden,))
        yield from _attention(f"{prefix}.self_attn", shape)
        yield TensorSpec(f"{prefix}.post_attention_layernorm.weight", "F32", (shape.hidden,))
        if layer == 0:
            yield from _gated(f"{prefix}.mlp", (), shape.hidden, shape.dense_intermediate)
        else:
            yield from _experts(f"{prefix}.mlp", shape)
    yield TensorSpec("model.norm.weight", "F32", (shape.hidden,))
    yield Matrix("lm_head", (shape.vocabulary, shape.hidden), _LOGIT_SPREAD)


def _attention(prefix: str, shape: ToyShape) -> Iterator[Matrix | TensorSpec]:
    heads, query = shape.heads, shape.nope + shape.rope
    yield Matrix(f"{prefix}.q_a_proj", (shape.q_lora, shape.hidden))
    yield TensorSpec(f"{prefix}.q_a_layernorm.weight", "F32", (shape.q_lora,))
    yield Matrix(f"{prefix}.q_b_proj", (heads * query, shape.q_lora), 2.0)
    yield Matrix(f"{prefix}.kv_a_proj_with_mqa", (shape.kv_lora + shape.rope, shape.hidden))
    yield TensorSpec(f"{prefix}.kv_a_layernorm.weight", "F32", (shape.kv_lora,))
    yield Matrix(f"{prefix}.embed_q", (heads, shape.kv_lora, shape.nope))
    yield Matrix(f"{prefix}.unembed_out", (heads, shape.value, shape.kv_lora))
    yield Matrix(f"{prefix}.o_proj", (shape.hidden, heads * shape.value), 2.0)


def _experts(prefix: str, shape: ToyShape) -> Iterator[Matrix | TensorSpec]:
    yield TensorSpec(f"{prefix}.gate.weight", "F32", (shape.experts, shape.hidden))
    yield TensorSpec(f"{prefix}.gate.e_score_correction_bias", "F32", (shape.experts,))
    size = shape.expert_intermediate
    yield from _gated(f"{prefix}.shared_experts", (), shape.hidden, size)
    yield from _gated(f"{prefix}.switch_mlp", (shape.experts,), shape.hidden, size)


def _gated(prefix: str, lead: tuple[int, ...], hidden: int, size: int) -> Iterator[Matrix]:
    yield Matrix(f"{prefix}.gate_proj", (*lead, size, hidden), 2.0)
    yield Matrix(f"{prefix}.up_proj", (*lead, size, hidden))
    yield Matrix(f"{prefix}.down_proj", (*lead, hidden, size), 2.0)


def _specs(part: Matrix | TensorSpec, shape: ToyShape) -> list[TensorSpec]:
    if isinstance(part, TensorSpec):
        return [part]
    *lead, inputs = part.shape
    if shape.bits is None:
        return [TensorSpec(f"{part.name}.weight", "F32", part.shape)]
    groups = (*lead, inputs // shape.group_size)
    return [
        TensorSpec(f"{part.name}.weight", "U32", (*lead, inputs * shape.bits // 32)),
        TensorSpec(f"{part.name}.scales", "F32", groups),
        TensorSpec(f"{part.name}.biases", "F32", groups),
    ]


def _arrays(part: Matrix | TensorSpec, shape: ToyShape, seed: int) -> Iterator[NDArray[Any]]:
    """The data of ``_specs``, in its order.

    Each tensor has a generator of its own, so that adding a layer does not change the others.
    Only integers and multiplications of them are drawn from, which are the same on any machine.
    """
    import numpy as np

    random = np.random.Generator(np.random.PCG64([seed, zlib.crc32(part.name.encode())]))
    if isinstance(part, TensorSpec):
        yield _plain(part, random)
        return
    specs = _specs(part, shape)
    spread = part.gain / math.sqrt(part.shape[-1])
    if shape.bits is None:
        yield _uniform(random, part.shape, spread)
        return
    yield random.integers(0, 2**32, specs[0].shape, np.uint32)
    # Codes 0 to n are equally likely: their standard deviation is sqrt(n (n + 2) / 12).
    highest = 2**shape.bits - 1
    unit = spread / math.sqrt(highest * (highest + 2) / 12)
    scales = np.float32(unit) + _uniform(random, specs[1].shape, unit / 4)
    yield scales
    yield scales * np.float32(-highest / 2)


def _plain(spec: TensorSpec, random: numpy.random.Generator) -> NDArray[Any]:
    import numpy as np

    if spec.name.endswith("gate.weight"):
        return _uniform(random, spec.shape, 2 / math.sqrt(spec.shape[-1]))
    spread = _uniform(random, spec.shape, 0.1)
    if spec.name.endswith("e_score_correction_bias"):
        return spread
    return np.float32(1) + spread


def _uniform(
    random: numpy.random.Generator, shape: tuple[int, ...], deviation: float
) -> NDArray[Any]:
    """Draw float32 values, uniform around 0, with the given standard deviation."""
    import numpy as np

    unit = random.random(shape, np.float32) - np.float32(0.5)
    values: NDArray[Any] = unit * np.float32(deviation * math.sqrt(12))
    return values
