"""Configs that contradict themselves, or say something of the wrong kind, are refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.architectures import recorded
from k2cli.errors import UsageError
from k2cli.models.class_defaults import DEFAULTS_DIFFER
from k2cli.models.config_consistency import check_long_lists, check_quantization
from k2cli.models.config_form import standard_config
from k2cli.sharding.assemble import build

RECORDED = {name: config for name, (_, config) in recorded().items()}


def refused(words: str, **fields: Any) -> None:
    with pytest.raises(UsageError) as caught:
        standard_config({"model_type": "llama", "num_hidden_layers": 4, **fields}, "config.json")
    assert words in str(caught.value)
    assert caught.value.hint


@pytest.mark.parametrize("value", [5, ["bfloat16"], True, {"": "float16"}])
@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
def test_a_float_type_that_is_no_name_is_refused(name: str, value: Any) -> None:
    refused(f"{name} must be the name of a float type, not {value!r}", **{name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("layer_types", ["full_attention"] * 3),
        ("mlp_layer_types", ["sparse"] * 5),
        ("no_rope_layers", [1, 1, 0]),
        ("hybrid_override_pattern", "M*M*M"),
    ],
)
def test_a_list_of_another_length_than_the_layers_is_refused(name: str, value: Any) -> None:
    refused(f"{name} describes {len(value)} layers, but there are 4", **{name: value})


def test_a_list_may_describe_the_layers_that_predict_further_tokens_too() -> None:
    fields = {"num_hidden_layers": 4, "num_nextn_predict_layers": 1}
    types = ["full_attention"] * 5
    standard_config({"model_type": "step3p5", "layer_types": types, **fields}, "config.json")


@pytest.mark.parametrize(("value", "written"), [(0, "0"), (None, "null")])
def test_layers_with_a_window_need_its_length(value: Any, written: str) -> None:
    refused(f"sliding_window is {written}", model_type="gpt_oss", sliding_window=value)
    types = ["sliding_attention", "full_attention"] * 2
    refused(f"sliding_window is {written}", layer_types=types, sliding_window=value)


def test_a_window_that_is_switched_off_needs_no_length() -> None:
    types = ["sliding_attention"] * 4
    fields = {"layer_types": types, "sliding_window": None, "use_sliding_window": False}
    standard_config({"model_type": "qwen3", "num_hidden_layers": 4, **fields}, "config.json")


@pytest.mark.parametrize(
    ("name", "ours", "other"), [("bits", 4, 8), ("group_size", 64, 32), ("mode", "affine", "mxfp4")]
)
def test_two_quantizations_that_differ_are_refused(name: str, ours: Any, other: Any) -> None:
    settings = {"bits": 4, "group_size": 64, "mode": "affine"}
    refused(
        f"quantization.{name} is {ours!r}, but quantization_config.{name} is {other!r}",
        quantization={**settings, name: ours}, quantization_config={**settings, name: other},
    )  # fmt: skip


def test_the_same_quantization_under_both_names_is_no_contradiction() -> None:
    settings = {"bits": 4, "group_size": 64}
    both = {"quantization": settings, "quantization_config": dict(settings)}
    standard_config({"model_type": "llama", **both}, "config.json")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"bits": 4, "group_size": 64, "mode": "wide"}, "quantization.mode must be one of affine"),
        ({"bits": 4, "group_size": 64, "mode": 5}, "quantization.mode must be one of affine"),
        ({"bits": 4, "group_size": 64, "mode": "mxfp4"}, "group_size must be 32 with mode mxfp4"),
        ({"bits": 4, "group_size": 16}, "quantization.group_size must be one of 32, 64, 128"),
        ({"bits": 4, "group_size": 64, "lm_head": {"bits": 7}},
         "quantization['lm_head'].bits must be one of"),
    ],
)  # fmt: skip
def test_a_quantization_that_mlx_has_no_kernel_for_is_refused(
    settings: dict[str, Any], words: str
) -> None:
    with pytest.raises(UsageError) as caught:
        check_quantization(settings, "config.json")
    assert words in str(caught.value)


@pytest.mark.parametrize(
    "settings",
    [
        {"bits": 4, "group_size": 32, "mode": "mxfp4"},
        {"bits": 4, "group_size": 16, "mode": "nvfp4"},
        {"bits": 4, "group_size": 64, "lm_head": {"bits": 8}, "gate": False},
    ],
)
def test_a_quantization_that_mlx_has_is_taken(settings: dict[str, Any]) -> None:
    check_quantization(settings, "config.json")


@pytest.mark.parametrize("name", ["short_factor", "long_factor"])
def test_short_lists_of_longrope_are_named_with_both_lengths(name: str) -> None:
    lists = {"short_factor": [1.0] * 48, "long_factor": [2.0] * 48, name: [1.0] * 3}
    refused(
        f"{name} of LongRoPE has 3 numbers, but a head rotates 48 pairs",
        model_type="phi3", hidden_size=192, num_attention_heads=2, rope_theta=1e4,
        rope_scaling={"type": "longrope", **lists},
    )  # fmt: skip


def test_lists_of_longrope_may_be_those_of_a_rotated_part() -> None:
    scaling = {"rope_type": "longrope", "short_factor": [1.0] * 12, "long_factor": [2.0] * 12}
    fields = {"head_dim": 32, "partial_rotary_factor": 0.75, "rope_scaling": scaling}
    check_long_lists(fields, "config.json")
    with pytest.raises(UsageError, match="12 numbers, but a head rotates 16 pairs"):
        check_long_lists({**fields, "partial_rotary_factor": 1.0}, "config.json")


@pytest.mark.parametrize(
    ("model_type", "name"),
    [
        ("llama", "tie_word_embeddings"), ("qwen3_moe", "norm_topk_prob"),
        ("deepseek_v3", "attention_bias"), ("kimi_k2", "norm_topk_prob"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("value", ["false", "true", 0, 1])
def test_text_or_a_number_for_true_or_false_is_refused(
    model_type: str, name: str, value: Any
) -> None:
    with pytest.raises(UsageError, match=f"{name} must be true or false, not {value!r}"):
        build({**RECORDED[model_type], name: value})


def test_a_boolean_of_a_nested_text_model_is_checked_too() -> None:
    config = RECORDED["kimi_k25"]
    text = {**config["text_config"], "norm_topk_prob": "false"}
    with pytest.raises(UsageError, match="norm_topk_prob must be true or false, not 'false'"):
        build({**config, "text_config": text})


@pytest.mark.parametrize(
    ("model_type", "name", "values"),
    [
        ("deepseek_v3", "first_k_dense_replace", "transformers takes 3 and mlx-lm 0"),
        ("kimi_k2", "first_k_dense_replace", "deepseek_v3 of transformers takes 3 and mlx-lm 0"),
        ("kimi_k2", "n_group", "deepseek_v3 of transformers takes 8 and mlx-lm 1"),
        ("joyai_llm_flash", "topk_group", "deepseek_v3 of transformers takes 4 and mlx-lm 1"),
        ("qwen3_next", "norm_topk_prob", "transformers takes True and mlx-lm False"),
        ("phimoe", "rms_norm_eps", "transformers takes 1e-05 and mlx-lm 1e-06"),
    ],
)
def test_a_missing_field_with_two_defaults_is_refused(
    model_type: str, name: str, values: str
) -> None:
    config = {key: value for key, value in RECORDED[model_type].items() if key != name}
    with pytest.raises(UsageError, match=f"lacks {name}, for which {values}"):
        build(config)


@pytest.mark.parametrize("model_type", ["kimi_k25", "kimi_vl"])
@pytest.mark.parametrize("own_type", [None, "kimi_k2", "deepseek_v3"])
def test_a_missing_field_of_a_nested_text_model_is_refused(
    model_type: str, own_type: str | None
) -> None:
    config = RECORDED[model_type]
    text = {**config["text_config"], "model_type": own_type}
    build({**config, "text_config": text})
    del text["first_k_dense_replace"]
    with pytest.raises(UsageError, match="lacks first_k_dense_replace, for which"):
        build({**config, "text_config": text})


@pytest.mark.parametrize(
    ("model_type", "name"),
    [
        ("kimi_k2", "norm_topk_prob"), ("qwen3_moe", "norm_topk_prob"),
        ("mamba", "use_conv_bias"), ("llama", "tie_word_embeddings"),
    ],
)  # fmt: skip
def test_null_is_refused_where_a_field_that_is_absent_is_not_false(
    model_type: str, name: str
) -> None:
    with pytest.raises(UsageError, match=f"{name} must be true or false, not null"):
        build({**RECORDED[model_type], name: None})


@pytest.mark.parametrize(
    ("model_type", "name"),
    [
        ("kimi_k2", "attention_bias"), ("qwen3_next", "attention_bias"),
        ("nemotron_h", "norm_topk_prob"),
    ],
)  # fmt: skip
def test_null_is_false_where_a_field_that_is_absent_is_false_too(
    model_type: str, name: str
) -> None:
    build({**RECORDED[model_type], name: None})


@pytest.mark.parametrize(("dtype", "other"), [("float16", "bfloat16"), ("bfloat16", "float32")])
def test_two_float_types_that_differ_are_refused(dtype: str, other: str) -> None:
    refused(f"dtype is {dtype!r}, but torch_dtype is {other!r}", dtype=dtype, torch_dtype=other)
    standard_config({"dtype": dtype, "torch_dtype": f"torch.{dtype}"}, "config.json")


def test_a_quantization_of_the_nested_text_model_that_differs_is_refused() -> None:
    text = {"quantization": {"bits": 8, "group_size": 64}}
    refused(
        "quantization.bits is 4, but text_config.quantization.bits is 8",
        quantization={"bits": 4, "group_size": 64}, text_config=text,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("model_type", "changes", "words"),
    [
        ("gpt_oss", {"swiglu_limit": 5.0}, "swiglu_limit 5.0"),
        ("qwen2_moe", {"norm_topk_prob": True}, "norm_topk_prob True"),
        ("qwen2_moe", {"decoder_sparse_step": 2}, "decoder_sparse_step 2"),
        ("mamba", {"layer_norm_epsilon": 1e-3}, "layer_norm_epsilon 0.001"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
        ("kimi_linear", {"mla_use_nope": False}, "mla_use_nope False"),
        ("nemotron", {"hidden_act": "silu"}, "hidden_act 'silu'"),
        ("nemotron_h", {"mlp_hidden_act": "silu"}, "mlp_hidden_act 'silu'"),
        ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention True"),
    ],
)
def test_a_value_that_the_class_has_as_a_constant_is_refused_if_it_differs(
    model_type: str, changes: dict[str, Any], words: str
) -> None:
    build(RECORDED[model_type])
    with pytest.raises(UsageError, match=words):
        build({**RECORDED[model_type], **changes})


@pytest.mark.parametrize(
    ("name", "value"), [("no_rope_layers", [1] * 8), ("moe_layers", [0, 1, 2])]
)
def test_llama_4s_layers_are_those_that_the_class_computes(name: str, value: list[int]) -> None:
    config = RECORDED["llama4"]
    same = {"no_rope_layers": [1, 1, 1, 0] * 2, "moe_layers": [1, 3, 5, 7]}
    build({**config, "text_config": {**config["text_config"], **same}})
    with pytest.raises(UsageError, match=name):
        build({**config, "text_config": {**config["text_config"], name: value}})


_ONLY_FOR_TENSORS = frozenset({
    "attention_bias", "conv1d_width", "intermediate_size", "lm_head_bias", "mlp_bias", "n_inner",
    "num_key_value_heads", "qk_layernorm", "qkv_bias", "use_bias",
})  # fmt: skip
"""Fields without which the tensors that are there do not fit."""


@pytest.mark.soak
def test_every_field_that_only_transformers_reads_is_known() -> None:
    """What transformers' modelling code reads and mlx-lm's class does not is handled or listed."""
    pytest.importorskip("transformers")
    from benchmarks.unread_fields import REVIEWED, unread_fields

    found = {name for fields in unread_fields(RECORDED).values() for name in fields}
    assert not found - REVIEWED - _ONLY_FOR_TENSORS


@pytest.mark.soak
def test_the_table_of_defaults_is_that_of_the_installed_classes() -> None:
    pytest.importorskip("transformers")
    from benchmarks.config_defaults import differences

    for model_type, fields in DEFAULTS_DIFFER.items():
        found = differences(model_type)
        for name, (theirs, ours) in fields.items():
            if isinstance(theirs, str) or isinstance(ours, str) or ours is None:
                continue  # computed from other fields
            assert found[name] == (theirs, pytest.approx(ours, rel=1e-4)), (model_type, name)


def test_the_users_own_file_is_named(tmp_path: Path) -> None:
    from k2cli.models.checkpoint import read_config

    config = {"model_type": "llama", "num_hidden_layers": 2, "layer_types": ["full_attention"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match=f"{tmp_path}/config.json: layer_types describes 1 layers"):
        read_config(tmp_path)
