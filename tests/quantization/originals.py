"""Small originals to quantize: random weights in the formats and names used on the Hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx

LLAMA = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 128,
    "num_hidden_layers": 2, "intermediate_size": 192, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 320, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
    "max_position_embeddings": 512, "tie_word_embeddings": False, "_name_or_path": "x/y",
}  # fmt: skip

KIMI = {
    "model_type": "kimi_k2", "architectures": ["DeepseekV3ForCausalLM"], "vocab_size": 320,
    "hidden_size": 256, "intermediate_size": 256, "moe_intermediate_size": 128,
    "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 4,
    "n_shared_experts": 1, "n_routed_experts": 4, "routed_scaling_factor": 2.0,
    "kv_lora_rank": 128, "q_lora_rank": 128, "qk_rope_head_dim": 32, "v_head_dim": 64,
    "qk_nope_head_dim": 64, "topk_method": "noaux_tc", "scoring_func": "sigmoid",
    "norm_topk_prob": True, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2,
    "moe_layer_freq": 1, "first_k_dense_replace": 1, "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "rope_scaling": None, "attention_bias": False,
    "tie_word_embeddings": False,
}  # fmt: skip


def save(folder: Path, config: dict[str, Any], tensors: dict[str, mx.array]) -> Path:
    """Write a checkpoint in two shards, with a minimal tokenizer beside it."""
    folder.mkdir(parents=True)
    names = list(tensors)
    halves = (names[: len(names) // 2], names[len(names) // 2 :])
    for number, half in enumerate(halves, start=1):
        part = {name: tensors[name] for name in half}
        mx.save_safetensors(str(folder / f"model-0000{number}-of-00002.safetensors"), part)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text(json.dumps(_TOKENIZER))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    (folder / "modeling_evil.py").write_text("raise SystemExit('code of a model was run')\n")
    return folder


_TOKENIZER = {
    "version": "1.0", "truncation": None, "padding": None, "added_tokens": [],
    "normalizer": None, "pre_tokenizer": {"type": "Whitespace"}, "post_processor": None,
    "decoder": None,
    "model": {"type": "WordLevel", "vocab": {"a": 0, "[UNK]": 1}, "unk_token": "[UNK]"},
}  # fmt: skip


def llama(folder: Path, dtype: mx.Dtype = mx.bfloat16, **changes: Any) -> Path:
    """Write a llama of 128 columns; ``changes`` go into its config."""
    mx.random.seed(3)
    config = {**LLAMA, "torch_dtype": str(dtype).removeprefix("mlx.core."), **changes}
    width, middle, heads = config["hidden_size"], config["intermediate_size"], 4
    head = width // heads
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (320, width)}
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        shapes |= {
            f"{prefix}.self_attn.q_proj.weight": (width, width),
            f"{prefix}.self_attn.k_proj.weight": (2 * head, width),
            f"{prefix}.self_attn.v_proj.weight": (2 * head, width),
            f"{prefix}.self_attn.o_proj.weight": (width, width),
            f"{prefix}.mlp.gate_proj.weight": (middle, width),
            f"{prefix}.mlp.up_proj.weight": (middle, width),
            f"{prefix}.mlp.down_proj.weight": (width, middle),
            f"{prefix}.input_layernorm.weight": (width,),
            f"{prefix}.post_attention_layernorm.weight": (width,),
            f"{prefix}.self_attn.rotary_emb.inv_freq": (head // 2,),
        }
    shapes |= {"model.norm.weight": (width,), "lm_head.weight": (320, width)}
    return save(folder, config, {name: _random(shape, dtype) for name, shape in shapes.items()})


def kimi(folder: Path, *, fp8: bool = False, dtype: mx.Dtype = mx.bfloat16) -> Path:
    """Write a Kimi K2 with Hugging Face's names: a tensor per expert, ``kv_b_proj`` in one piece.

    ``fp8`` stores linear weights as Moonshot does: 8-bit floats with a scale per 128x128 block.
    """
    mx.random.seed(5)
    config: dict[str, Any] = {**KIMI, "torch_dtype": str(dtype).removeprefix("mlx.core.")}
    if fp8:
        config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    tensors: dict[str, mx.array] = {}

    def linear(name: str, *shape: int) -> None:
        weight = _random(shape, mx.float32)
        if not fp8:
            tensors[f"{name}.weight"] = weight.astype(dtype)
            return
        rows, columns = shape
        tensors[f"{name}.weight"] = mx.to_fp8(weight * 8)
        blocks = (-(-rows // 128), -(-columns // 128))
        tensors[f"{name}.weight_scale_inv"] = mx.random.uniform(0.05, 0.2, blocks)

    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    tensors["model.embed_tokens.weight"] = _random((320, hidden), dtype)
    for layer in range(config["num_hidden_layers"]):
        attention = f"model.layers.{layer}.self_attn"
        linear(f"{attention}.q_a_proj", 128, hidden)
        linear(f"{attention}.q_b_proj", heads * 96, 128)
        linear(f"{attention}.kv_a_proj_with_mqa", 160, hidden)
        linear(f"{attention}.kv_b_proj", heads * 128, 128)
        linear(f"{attention}.o_proj", hidden, heads * 64)
        for norm, width in (("q_a_layernorm", 128), ("kv_a_layernorm", 128)):
            tensors[f"{attention}.{norm}.weight"] = _random((width,), dtype)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"model.layers.{layer}.{norm}.weight"] = _random((hidden,), dtype)
        mlp = f"model.layers.{layer}.mlp"
        parts = [(mlp, 256)]
        if layer > 0:
            parts = [(f"{mlp}.experts.{e}", 128) for e in range(4)]
            parts.append((f"{mlp}.shared_experts", 128))
            tensors[f"{mlp}.gate.weight"] = _random((4, hidden), dtype)
            tensors[f"{mlp}.gate.e_score_correction_bias"] = _random((4,), mx.float32)
        for part, size in parts:
            linear(f"{part}.gate_proj", size, hidden)
            linear(f"{part}.up_proj", size, hidden)
            linear(f"{part}.down_proj", hidden, size)
    tensors["model.norm.weight"] = _random((hidden,), dtype)
    tensors["lm_head.weight"] = _random((320, hidden), dtype)
    return save(folder, config, tensors)


def _random(shape: tuple[int, ...], dtype: mx.Dtype) -> mx.array:
    return (mx.random.normal(shape) * 0.05).astype(dtype)
