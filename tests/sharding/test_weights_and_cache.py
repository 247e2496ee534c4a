"""Traced sizes: known figures of the full K2, and models that cannot be cut."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.even_split import even_split
from k2cli.choices import Strategy
from k2cli.errors import K2Error, UsageError
from k2cli.sharding.placement import Placement, RankPlacement
from k2cli.sharding.tensor import tensor_obstacle
from k2cli.sharding.trace import trace_model
from k2cli.sharding.weights_and_cache import parameter_count
from tests.support.footprints import footprints

CONFIGS = Path(__file__).parents[1] / "data" / "configs"
CONTEXT = 131_072
K2_PARAMETERS = 1_026_408_232_448
K2_KV_BYTES = 70_272 * CONTEXT


def _config(name: str) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((CONFIGS / name / "config.json").read_text())
    return config


def _placement(strategy: Strategy, size: int) -> Placement:
    layers = even_split(61, size) if strategy == "pipeline" else ((0, 61),) * size
    parts = tuple(RankPlacement(rank, f"n{rank}", part) for rank, part in enumerate(layers))
    return Placement(strategy, parts)


def test_k2_at_4_bits_weighs_what_is_known() -> None:
    config = _config("k2-mlx-4bit")
    assert parameter_count(config) == K2_PARAMETERS
    [single] = footprints(config, _placement("single", 1), context_length=CONTEXT)
    assert single.weights_bytes == 577_593_515_008
    assert single.kv_cache_bytes == K2_KV_BYTES


def test_tensor_slices_of_k2_replicate_head_and_latent_cache() -> None:
    ranks = footprints(_config("k2-mlx-4bit"), _placement("tensor", 2), context_length=CONTEXT)
    assert [rank.weights_bytes for rank in ranks] == [289_883_266_048] * 2
    assert [rank.kv_cache_bytes for rank in ranks] == [K2_KV_BYTES] * 2


def test_tensor_slices_of_k2_with_the_head_cut_too() -> None:
    placement = dataclasses.replace(_placement("tensor", 2), head="sharded")
    ranks = footprints(_config("k2-mlx-4bit"), placement, context_length=CONTEXT)
    assert [rank.weights_bytes for rank in ranks] == [289_552_964_608] * 2


def test_pipeline_stages_of_k2_share_weights_and_cache() -> None:
    ranks = footprints(_config("k2-mlx-4bit"), _placement("pipeline", 2), context_length=CONTEXT)
    assert sum(rank.weights_bytes for rank in ranks) == 577_593_515_008
    assert sum(rank.kv_cache_bytes for rank in ranks) == K2_KV_BYTES
    assert ranks[0].kv_cache_bytes * 30 == ranks[1].kv_cache_bytes * 31


@pytest.mark.parametrize("name", ["k2-thinking", "k2.5"])
def test_native_int4_is_held_with_biases(name: str) -> None:
    [single] = footprints(_config(name), _placement("single", 1), context_length=CONTEXT)
    assert single.weights_bytes == 657_623_182_336
    assert parameter_count(_config(name)) == K2_PARAMETERS


def test_heads_that_do_not_divide_are_refused_with_the_numbers() -> None:
    config = _config("k2-mlx-4bit")
    model = trace_model(config)
    assert tensor_obstacle(config, model, 2) is None
    assert "64 attention heads, which 3 ranks" in str(tensor_obstacle(config, model, 3))


@pytest.mark.parametrize(
    "change",
    [
        {"num_hidden_layers": "many"},
        {"num_hidden_layers": -1},
        {"hidden_size": None},
        {"num_attention_heads": 0},
        {"model_type": "no_such_model"},
        {"model_type": "../evil"},
        {"quantization": {"bits": 4}},
        {"quantization": {"bits": 4, "group_size": 7}},
    ],
)
def test_a_config_that_makes_no_model_is_a_clear_error(change: dict[str, Any]) -> None:
    config = _config("k2-mlx-4bit") | change
    with pytest.raises(K2Error):
        footprints(config, _placement("single", 1), context_length=16)


def test_headers_that_do_not_fit_the_config_are_named() -> None:
    config = _config("k2-mlx-4bit") | {"num_hidden_layers": 1}
    with pytest.raises(K2Error, match="lacks tensors"):
        trace_model(config, {"model.norm.weight": ("BF16", (7168,))})
    with pytest.raises(K2Error, match="element type"):
        trace_model(config, {"model.norm.weight": ("C64", (7168,))})


def test_an_original_that_mlx_cannot_load_is_refused() -> None:
    config = _config("k2-thinking")
    config["quantization_config"] = {"quant_method": "exl3", "bits": 3}
    with pytest.raises(UsageError, match="exl3"):
        trace_model(config)
