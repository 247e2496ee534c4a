"""Configs of newer and older tools, brought into the form that mlx-lm's classes read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from k2cli.errors import UsageError
from k2cli.models.checkpoint import read_config
from k2cli.models.config_form import standard_config
from k2cli.models.rope_form import rope_by_layer_type

YARN = {"factor": 32.0, "beta_fast": 1.0, "original_max_position_embeddings": 4096}


def form(**fields: Any) -> dict[str, Any]:
    return standard_config({"model_type": "llama", **fields}, "config.json")


def test_rope_parameters_of_transformers_5_are_written_under_the_old_names_too() -> None:
    standard = form(rope_parameters={"rope_theta": 50000.0, "rope_type": "yarn", **YARN})
    assert standard["rope_theta"] == 50000.0
    assert standard["rope_scaling"] == {"rope_type": "yarn", "type": "yarn", **YARN}


def test_old_names_are_written_as_rope_parameters_too() -> None:
    standard = form(
        rope_theta=5e5, partial_rotary_factor=0.5, rope_scaling={"type": "yarn", **YARN}
    )
    parameters = standard["rope_parameters"]
    assert (parameters["rope_theta"], parameters["partial_rotary_factor"]) == (5e5, 0.5)
    assert parameters["rope_type"] == parameters["type"] == "yarn"


@pytest.mark.parametrize("name", ["type", "rope_type"])
def test_the_type_of_scaling_has_both_of_its_names(name: str) -> None:
    scaling = form(rope_theta=1e4, rope_scaling={name: "linear", "factor": 4})["rope_scaling"]
    assert scaling == {"type": "linear", "rope_type": "linear", "factor": 4.0}


def test_parameters_per_layer_type_give_gemma_its_two_thetas() -> None:
    per_type = {
        "full_attention": {"rope_theta": 1e6, "rope_type": "linear", "factor": 8.0},
        "sliding_attention": {"rope_theta": 5000.0, "rope_type": "default"},
    }
    standard = form(model_type="gemma3_text", rope_parameters=per_type)
    assert (standard["rope_theta"], standard["rope_local_base_freq"]) == (1e6, 5000.0)
    assert standard["rope_scaling"]["factor"] == 8.0


def test_a_null_layer_type_has_no_rope() -> None:
    given = {"full_attention": None, "sliding_attention": {"rope_theta": 1e4}}
    assert rope_by_layer_type(form(rope_parameters=given))["full_attention"] is None


def test_a_default_type_is_no_scaling() -> None:
    assert form(rope_parameters={"rope_theta": 1e4, "rope_type": "default"})["rope_scaling"] is None


@pytest.mark.parametrize(
    "fields",
    [
        {"rope_theta": 1e4, "rope_parameters": {"rope_theta": 5e5}},
        {"rope_theta": 1e4, "rope_scaling": {"type": "yarn", "rope_type": "linear", "factor": 2}},
        {"rope_scaling": {"type": "yarn", "factor": 2},
         "rope_parameters": {"rope_theta": 1e4, "rope_type": "yarn", "factor": 4}},
        {"rope_theta": 1e4, "rotary_emb_base": 5e4},
        {"rope_theta": 7.0, "rope_parameters": {"full_attention": {"rope_theta": 1e4},
                                                "sliding_attention": {"rope_theta": 5e5}}},
    ],
)  # fmt: skip
def test_a_config_that_contradicts_itself_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="contradicts itself"):
        form(**fields)


@pytest.mark.parametrize(
    ("scaling", "words"),
    [
        ({"factor": 4.0}, "factor 4.0, but no type"),
        ({"type": "default", "factor": 4.0}, "factor 4.0, but no type"),
        ({"type": "yarn", "factor": True}, "factor of RoPE must be a number, not True"),
        ({"type": "yarn", "factor": "32"}, "factor of RoPE must be a number, not '32'"),
        ({"type": "yarn", "factor": 4.0, "mscale": "1"}, "mscale of RoPE must be a number"),
    ],
)
def test_scaling_without_a_type_or_of_another_kind_is_refused(
    scaling: dict[str, Any], words: str
) -> None:
    with pytest.raises(UsageError, match=words):
        form(rope_theta=1e4, rope_scaling=scaling)


def test_null_is_no_layer_without_experts() -> None:
    assert form(model_type="qwen3_moe", mlp_only_layers=None)["mlp_only_layers"] == []


def test_equal_statements_in_both_forms_are_no_contradiction() -> None:
    fields = {"rope_theta": 1e4, "rope_parameters": {"rope_theta": 1e4, "rope_type": "default"}}
    assert form(**fields)["rope_theta"] == 1e4


def test_aliases_of_a_type_are_no_contradiction() -> None:
    assert form(rope_theta=1e4, rope_scaling={"type": "mrope", "rope_type": "default",
                                              "mrope_section": [1, 2, 3]})  # fmt: skip


def test_dtype_stands_for_torch_dtype() -> None:
    assert form(dtype="float16")["torch_dtype"] == "float16"


@pytest.mark.parametrize("name", ["num_local_experts", "q_lora_rank", "head_dim", "sliding_window"])
def test_zero_means_none(name: str) -> None:
    assert form(**{name: 0})[name] is None


def test_the_nested_text_model_is_standardized_and_the_given_config_is_not_changed() -> None:
    given = {"model_type": "kimi_k25", "tie_word_embeddings": True, "text_config": {
        "dtype": "bfloat16", "rope_parameters": {"rope_theta": 9.0, "rope_type": "default"},
    }}  # fmt: skip
    before = json.dumps(given)
    text = standard_config(given, "config.json")["text_config"]
    assert (text["rope_theta"], text["torch_dtype"]) == (9.0, "bfloat16")
    assert text["tie_word_embeddings"] is True
    assert json.dumps(given) == before


def test_tagged_floats_of_transformers_5_are_floats() -> None:
    assert form(time_step_limit=[0.0, {"__float__": "Infinity"}])["time_step_limit"][1] == float(
        "inf"
    )


def test_layer_types_give_the_interval_that_older_classes_read() -> None:
    types = (["sliding_attention"] * 3 + ["full_attention"]) * 2
    assert form(model_type="cohere2", layer_types=types)["sliding_window_pattern"] == 4
    assert form(model_type="exaone4", layer_types=types)["sliding_window_pattern"] == "LLLG"


def test_standardizing_twice_changes_nothing_further() -> None:
    for path in (Path(__file__).parents[2] / "k2cli" / "models" / "configs").glob("*/config.json"):
        once = read_config(path.parent)
        assert standard_config(once, "config.json") == once, path.parent.name
