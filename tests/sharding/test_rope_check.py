"""The RoPE of built models against their configs, and against the formulas of transformers."""

from __future__ import annotations

import copy
import logging
import math
import types
from typing import Any

import numpy as np
import pytest

from benchmarks.rope_forms import PAGE, Forms, page, results
from k2cli.errors import UsageError
from k2cli.models.config_form import standard_config
from k2cli.models.rope_form import rope_by_layer_type
from k2cli.sharding.assemble import build
from k2cli.sharding.rope_check import Rotation, meant_rotation, rotations

SIZES: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "head_dim": 32, "vocab_size": 128, "rms_norm_eps": 1e-5,
    "max_position_embeddings": 32768, "tie_word_embeddings": True,
}  # fmt: skip
LLAMA = {"model_type": "llama", **SIZES}
QWEN_MOE = {
    "model_type": "qwen3_moe", **SIZES, "num_experts": 4, "num_experts_per_tok": 2,
    "decoder_sparse_step": 1, "mlp_only_layers": [], "moe_intermediate_size": 64,
    "norm_topk_prob": True,
}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096}


def built(config: dict[str, Any]) -> dict[str, Rotation]:
    return {path: rotation for path, _, rotation in rotations(build(config))}


@pytest.fixture(scope="module")
def walked() -> dict[str, Forms]:
    return results()


def test_no_architecture_differs_between_the_old_and_the_new_form(walked: dict[str, Forms]) -> None:
    different = {
        name: each for name, each in walked.items() if "DIFFERENT" in each.plain + each.yarn
    }
    assert not different
    assert sum(each.plain == "equal" for each in walked.values()) > 110
    assert PAGE.read_text(encoding="utf-8") == page(walked), "run scripts/rope-forms"


class _Numbers(np.ndarray):
    """An array of numpy with the two methods of torch's that the formulas call."""

    def to(self, *_: object, **__: object) -> _Numbers:
        return self

    float = to


def _numbers(value: Any) -> _Numbers:
    return np.asarray(value, dtype=np.float64).view(_Numbers)


@pytest.mark.parametrize(
    "scaling",
    [
        {"type": "linear", "factor": 4},
        {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
         "original_max_position_embeddings": 2048},
        YARN,
        {**YARN, "beta_fast": 16, "beta_slow": 2, "truncate": False},
        {**YARN, "mscale": 1.0, "mscale_all_dim": 0.7},
        {**YARN, "attention_factor": 1.3},
        {"type": "yarn", "factor": 8},
        {"type": "longrope", "short_factor": [1.0] * 16,
         "long_factor": [1 + i / 9 for i in range(16)], "original_max_position_embeddings": 4096},
        {"rope_type": "proportional", "partial_rotary_factor": 0.25},
    ],
    ids=lambda scaling: "-".join(str(each) for each in scaling.values())[:30],
)  # fmt: skip
def test_the_meant_rotation_is_that_of_transformers(
    scaling: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch is not installed: numpy stands in for the six functions that the formulas use."""
    logging.disable(logging.WARNING)
    from transformers import LlamaConfig, modeling_rope_utils

    stand_in = types.SimpleNamespace(
        arange=lambda *a, **_: _numbers(np.arange(*a)), int64=None, float=None, float32=None,
        where=lambda *a: _numbers(np.where(*a)), clamp=lambda *a: _numbers(np.clip(*a)),
        tensor=lambda value, **_: _numbers(value), zeros=lambda n, **_: _numbers(np.zeros(n)),
        cat=lambda parts, **_: _numbers(np.concatenate(parts)),
    )  # fmt: skip
    monkeypatch.setattr(modeling_rope_utils, "torch", stand_in, raising=False)
    config = {**SIZES, "rope_theta": 12345.0, "rope_scaling": scaling}
    theirs = LlamaConfig(**copy.deepcopy(config))
    kind = theirs.rope_parameters["rope_type"]
    length = {"seq_len": 32768} if kind == "longrope" else {}
    inverse, scale = modeling_rope_utils.ROPE_INIT_FUNCTIONS[kind](theirs, None, **length)

    standard = standard_config({"model_type": "llama", **config}, "config.json")
    parameters = rope_by_layer_type(standard)[None]
    assert parameters is not None
    meant = meant_rotation(parameters, 32, standard)
    assert math.isclose(meant.scale, scale, rel_tol=1e-9)
    with np.errstate(divide="ignore"):
        np.testing.assert_allclose(meant.wavelengths, 1 / np.asarray(inverse), rtol=1e-9)


def test_a_llama_of_transformers_5_has_the_theta_that_it_says() -> None:
    """rope_v5/demo_v5 of the public reports (mlx-lm#1563)."""
    new = built({**LLAMA, "rope_parameters": {"rope_theta": 1e5, "rope_type": "default"}})
    assert new == built({**LLAMA, "rope_theta": 1e5})
    assert new != built({**LLAMA, "rope_theta": 1e4})


def test_a_kimi_k2_of_transformers_5_has_the_yarn_that_it_says() -> None:
    """rope_v5/toy_v5 of the public reports (mlx-lm#953, marin#7156)."""
    toy = {
        "model_type": "kimi_k2", **SIZES, "num_hidden_layers": 2, "moe_intermediate_size": 32,
        "n_shared_experts": 1, "n_routed_experts": 4, "num_experts_per_tok": 2, "q_lora_rank": 64,
        "kv_lora_rank": 64, "qk_rope_head_dim": 32, "qk_nope_head_dim": 32, "v_head_dim": 32,
        "routed_scaling_factor": 2.8, "topk_method": "noaux_tc", "scoring_func": "sigmoid",
        "norm_topk_prob": True, "n_group": 1, "topk_group": 1, "moe_layer_freq": 1,
        "first_k_dense_replace": 1,
    }  # fmt: skip
    yarn = {"beta_fast": 1.0, "beta_slow": 1.0, "factor": 32.0, "mscale": 1.0,
            "mscale_all_dim": 1.0, "original_max_position_embeddings": 4096}  # fmt: skip
    old = build({**toy, "rope_theta": 5e4, "rope_scaling": {"type": "yarn", **yarn}})
    new = build({**toy, "rope_parameters": {"rope_theta": 5e4, "rope_type": "yarn", **yarn}})
    assert [each for _, _, each in rotations(old)] == [each for _, _, each in rotations(new)]
    assert old.model.layers[0].self_attn.scale == new.model.layers[0].self_attn.scale


@pytest.mark.parametrize("name", ["rope_scaling", "rope_parameters"])
def test_yarn_that_qwen3_moe_does_not_compute_is_refused(name: str) -> None:
    with pytest.raises(
        UsageError, match=r"yarn with factor 4\.0, which mlx-lm's qwen3_moe does not"
    ):
        build({**QWEN_MOE, "rope_theta": 1e6, name: YARN})


def test_a_parameter_that_the_class_does_not_know_is_refused() -> None:
    with pytest.raises(UsageError, match=r"rope_parameters.llama_4_scaling_beta 0.1"):
        build({**LLAMA, "rope_theta": 1e4, "rope_scaling": {**YARN, "llama_4_scaling_beta": 0.1}})


GLM = {"model_type": "glm", **SIZES, "rope_theta": 1e4, "attention_bias": False}


@pytest.mark.parametrize("said", [{"partial_rotary_factor": 0.5}, {}])
def test_a_part_of_the_head_that_a_plain_class_ignores_is_put_right(said: dict[str, Any]) -> None:
    """mlx-lm's GLM rotates whole heads (mlx-lm#1698); transformers half, if nothing is said."""
    assert {each.dims for each in built({**GLM, **said}).values()} == {16}


def test_a_part_of_the_head_that_a_scaled_class_ignores_is_refused() -> None:
    llama = {**LLAMA, "rope_theta": 1e4, "rope_scaling": YARN}
    with pytest.raises(UsageError, match=r"partial_rotary_factor 0\.5"):
        build({**llama, "partial_rotary_factor": 0.5})


@pytest.mark.parametrize("given", [{"truncate": False}, {"attention_factor": 1.25}])
def test_what_yarn_modules_ignore_is_put_right(given: dict[str, Any]) -> None:
    """GPT-OSS says ``truncate: false``, which mlx-lm's module of YaRN does not read."""
    plain = {**LLAMA, "rope_theta": 150000, "rope_scaling": YARN}
    corrected = {**plain, "rope_scaling": {**YARN, **given}}
    standard = standard_config(corrected, "config.json")
    [meant] = {
        meant_rotation(each, 32, standard) for each in rope_by_layer_type(standard).values() if each
    }
    assert all(each.is_close(meant) for each in built(corrected).values())
    assert not any(each.is_close(meant) for each in built(plain).values())


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("attn_logit_softcapping", 50.0), ("hidden_act", "gelu"), ("residual_multiplier", 0.22),
        ("position_embedding_type", "nope"), ("logits_scaling", 8.0), ("clip_qkv", 8.0),
    ],
)  # fmt: skip
def test_a_field_that_changes_the_result_and_is_not_read_is_refused(field: str, value: Any) -> None:
    with pytest.raises(UsageError, match=f"config.json has {field} .*, which mlx-lm's llama"):
        build({**LLAMA, "rope_theta": 1e4, field: value})


@pytest.mark.parametrize(
    ("field", "value"), [("residual_multiplier", 1.0), ("hidden_act", "silu"), ("clip_qkv", None)]
)
def test_a_field_that_changes_nothing_is_no_obstacle(field: str, value: Any) -> None:
    build({**LLAMA, "rope_theta": 1e4, field: value})


def test_a_missing_theta_is_refused_where_the_tools_differ() -> None:
    with pytest.raises(UsageError, match="lacks rope_theta, for which transformers takes 10000"):
        build({**LLAMA, "model_type": "qwen2"})
