"""Plans and conversions of configs that newer and older tools wrote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.utils
import pytest
from mlx_lm.utils import load_model

from k2cli.launch.plan import make_launch_plan
from k2cli.launch.request import LaunchRequest
from k2cli.planning.config_check import model_context_length
from k2cli.planning.hardware.spec import parse_hardware
from k2cli.planning.planner import Planner
from k2cli.planning.request import PlanRequest
from k2cli.quantization.convert import quantize
from k2cli.sharding.assemble import build
from k2cli.sharding.recipe import parse_recipe

LLAMA: dict[str, Any] = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 128, "rms_norm_eps": 1e-5,
    "max_position_embeddings": 512, "tie_word_embeddings": True, "hidden_act": "silu",
}  # fmt: skip
GRANITE: dict[str, Any] = {
    "model_type": "granitemoehybrid", "vocab_size": 1024, "hidden_size": 256,
    "intermediate_size": 512, "shared_intermediate_size": 512, "num_hidden_layers": 2,
    "num_attention_heads": 8, "num_key_value_heads": 4, "num_local_experts": 0,
    "num_experts_per_tok": 0, "layer_types": ["mamba", "attention"], "rope_theta": 10000,
    "position_embedding_type": "nope", "rms_norm_eps": 1e-05, "max_position_embeddings": 32768,
    "embedding_multiplier": 12.0, "attention_multiplier": 0.0078125, "residual_multiplier": 0.22,
    "logits_scaling": 3.0, "mamba_n_heads": 8, "mamba_d_head": 64, "mamba_d_state": 32,
    "mamba_n_groups": 1, "mamba_d_conv": 4, "mamba_conv_bias": True, "mamba_proj_bias": False,
    "attention_bias": False, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
}  # fmt: skip


def model_folder(folder: Path, config: dict[str, Any], *, stored: bool = False) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if stored:
        weights = dict(mlx.utils.tree_flatten(build(config).parameters()))
        mx.save_safetensors(str(folder / "model.safetensors"), weights)
    return folder


def planned_bytes(folder: Path) -> int:
    plan = Planner(str(folder)).plan(parse_hardware("m4-max-128"), PlanRequest())
    return plan.nodes[0].total_bytes


@pytest.mark.parametrize("experts", [0, None])
def test_zero_experts_are_a_dense_model(tmp_path: Path, experts: int | None) -> None:
    """granite_dense/ of the public reports (mlx-lm#442)."""
    dense = model_folder(tmp_path / "dense", {**GRANITE, "num_local_experts": experts})
    moe = {**GRANITE, "num_local_experts": 8, "num_experts_per_tok": 2}
    assert planned_bytes(dense) < planned_bytes(model_folder(tmp_path / "moe", moe))


def test_both_forms_plan_alike(tmp_path: Path) -> None:
    old = {**LLAMA, "rope_theta": 5e5, "torch_dtype": "float16"}
    new = {**LLAMA, "rope_parameters": {"rope_theta": 5e5, "rope_type": "default"},
           "dtype": "float16"}  # fmt: skip
    sizes = {planned_bytes(model_folder(tmp_path / n, c)) for n, c in (("a", old), ("b", new))}
    assert len(sizes) == 1


def test_mlx_lm_reads_a_converted_checkpoint_as_k2_does(tmp_path: Path) -> None:
    config = {**LLAMA, "rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}
    source = model_folder(tmp_path / "source", config, stored=True)
    for _ in quantize(source, tmp_path / "small", parse_recipe("4bit")):
        pass
    model, _ = load_model(tmp_path / "small")
    assert model.model.layers[0].self_attn.rope.base == 5e5


@pytest.mark.parametrize(
    ("fields", "longest"),
    [
        ({"model_type": "mistral", "sliding_window": 256}, 256),
        ({"model_type": "mistral", "sliding_window": None}, 512),
        ({"model_type": "phi3", "sliding_window": 300}, 300),
        ({"model_type": "qwen2", "sliding_window": 256, "use_sliding_window": False}, 512),
        ({"model_type": "qwen2", "sliding_window": 256, "use_sliding_window": True}, 256),
        ({"model_type": "qwen2", "sliding_window": 256, "use_sliding_window": True,
          "max_window_layers": 2}, 512),
        ({"model_type": "gpt_oss", "sliding_window": 128}, 512),
        ({"model_type": "gemma2", "sliding_window": 256}, 256),
        ({"model_type": "gemma2", "sliding_window": 256,
          "layer_types": ["full_attention", "full_attention"]}, 512),
        ({"model_type": "dots1", "sliding_window": 256,
          "layer_types": ["sliding_attention", "full_attention"]}, 256),
        ({"model_type": "llama4_text", "attention_chunk_size": 256,
          "layer_types": ["chunked_attention", "full_attention"]}, 256),
        ({"model_type": "llama4_text", "floor_scale": 300, "attn_temperature_tuning": True,
          "no_rope_layers": [1, 0]}, 299),
        ({"model_type": "llama4_text", "floor_scale": 300, "attn_temperature_tuning": True,
          "no_rope_layers": [1, 1]}, 512),
        ({"model_type": "kimi_linear", "max_position_embeddings": None,
          "model_max_length": 400}, 400),
    ],
)  # fmt: skip
def test_the_longest_context_is_that_up_to_which_the_class_computes_right(
    fields: dict[str, Any], longest: int
) -> None:
    assert model_context_length({**LLAMA, **fields}) == longest


def test_a_launch_plans_from_the_files_that_are_there_and_warns(tmp_path: Path) -> None:
    """stale_index/ of the public reports (mlx-vlm#624)."""
    folder = model_folder(tmp_path / "model", {**LLAMA, "rope_theta": 1e4}, stored=True)
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    said: list[str] = []
    machines = parse_hardware("m4-max-128")
    plan = make_launch_plan(LaunchRequest(str(folder)), folder, machines, "local", said.append)
    assert plan.fits
    assert [text.partition(":")[0] for text in said] == ["warning"]
    assert "is stale" in said[0]
