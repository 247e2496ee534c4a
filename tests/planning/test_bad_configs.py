"""Configs with fields that are missing, negative, huge, of another kind or nested junk."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from benchmarks.architectures import recorded
from k2cli.errors import InternalError, K2Error
from k2cli.planning.hardware.spec import parse_hardware
from k2cli.planning.model import read_model
from tests.planning.plans import make_plan

FIXTURES = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
ARCHITECTURES = (
    "deepseek_v32", "gpt_oss", "kimi_k2", "kimi_k25", "kimi_k3", "llama", "minimax_m2",
    "qwen3_5_moe", "qwen3_moe",
)  # fmt: skip
CONFIGS = {name: config for name, (_, config) in recorded().items() if name in ARCHITECTURES}
MISSING = object()
HUGE = 10**4000
MOST_MESSAGE = 2000

DECISIVE = (
    "num_hidden_layers", "hidden_size", "vocab_size", "num_attention_heads", "intermediate_size",
    "moe_intermediate_size", "n_routed_experts", "num_experts_per_tok", "kv_lora_rank",
    "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "max_position_embeddings",
)  # fmt: skip
"""Fields of K2's config that decide bytes."""

MAY_BE_MISSING = ("max_position_embeddings", "n_routed_experts")
"""Optional fields: a model's maximum is then unknown, or the model is dense."""


def write(folder: Path, config: dict[str, Any]) -> str:
    """A checkpoint's folder with this config; integers may be longer than Python likes."""
    limit = sys.get_int_max_str_digits()
    sys.set_int_max_str_digits(0)
    try:
        (folder / "config.json").write_text(json.dumps(config))
    finally:
        sys.set_int_max_str_digits(limit)
    return str(folder)


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (MISSING, "lacks"), (-1, "-1"), (0, "0"), (2**60, str(2**60)), (1.5, "1.5"),
        ("wide", "'wide'"), (True, "True"), ({"a": [1]}, "{'a': [1]}"), ([-1], "-1"),
        (float("nan"), "nan"), ([[[]]], "[[]]"),
    ],
    ids=["missing", "negative", "zero", "huge", "half", "text", "true", "object", "list", "nan",
         "nested"],
)  # fmt: skip
@pytest.mark.parametrize("field", DECISIVE)
def test_a_decisive_field_is_named_with_its_value(
    tmp_path: Path, field: str, value: Any, shown: str
) -> None:
    config = copy.deepcopy(CONFIGS["kimi_k2"])
    if value is MISSING:
        del config[field]
        if field in MAY_BE_MISSING:
            assert read_model(write(tmp_path, config)).facts.layer_count == 8
            return
    else:
        config[field] = value
    with pytest.raises(K2Error) as caught:
        read_model(write(tmp_path, config))
    assert caught.value.exit_code in (1, 2)
    assert field in caught.value.message
    assert shown in caught.value.message


def test_a_number_of_thousands_of_digits_is_an_error(tmp_path: Path) -> None:
    config = {**CONFIGS["kimi_k2"], "hidden_size": HUGE * 10**4000}
    with pytest.raises(K2Error, match=r"config\.json is not JSON: Exceeds the limit"):
        read_model(write(tmp_path, config))
    with pytest.raises(K2Error, match=r"hidden_size must be .* not a number of about 132.. bits"):
        read_model(write(tmp_path, {**config, "hidden_size": HUGE}))


def check_error(error: K2Error) -> None:
    assert not isinstance(error, InternalError)
    assert error.exit_code in (1, 2)
    assert 10 < len(error.message) < MOST_MESSAGE


junk = st.one_of(
    st.just(MISSING),
    st.none(),
    st.booleans(),
    st.integers(-3, 9),
    st.sampled_from([2**31, 2**63, 10**400, -(2**40), 1e308, float("nan"), float("-inf"), 0.3]),
    st.text(max_size=6),
    st.recursive(
        st.none() | st.integers(-2, 3) | st.text(max_size=3),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(st.sampled_from(["type", "factor", "bits", "a"]), inner, max_size=3)
        ),
        max_leaves=5,
    ),
)


def places(config: dict[str, Any]) -> list[tuple[str, ...]]:
    """Every field of a config and of the objects in it."""
    found: list[tuple[str, ...]] = []
    for name, value in config.items():
        found.append((name,))
        if isinstance(value, dict):
            found += [(name, *rest) for rest in places(value)]
    return found


@settings(max_examples=80, deadline=None, derandomize=True, suppress_health_check=FIXTURES)
@given(data=st.data())
def test_whatever_a_config_says_it_plans_or_is_refused(tmp_path: Path, data: st.DataObject) -> None:
    config = copy.deepcopy(CONFIGS[data.draw(st.sampled_from(ARCHITECTURES))])
    for place in data.draw(st.lists(st.sampled_from(places(config)), min_size=1, max_size=2)):
        *path, name = place
        part: Any = config
        for step in path:
            part = part.get(step) if isinstance(part, dict) else None
        if not isinstance(part, dict):
            continue
        value = data.draw(junk)
        if value is MISSING:
            part.pop(name, None)
        else:
            part[name] = value
    try:
        plan = make_plan(write(tmp_path, config), parse_hardware("2x m3-ultra-512"))
    except K2Error as error:
        check_error(error)
    else:
        assert all(node.weights_bytes > 0 for node in plan.nodes)
