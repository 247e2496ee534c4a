"""Statements of configs that change the result, in forms that mlx-lm's classes do not read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import k2cli.models
from k2cli.errors import UsageError
from k2cli.planning.hardware.spec import parse_hardware
from k2cli.planning.planner import Planner
from k2cli.planning.request import PlanRequest

CONFIGS = Path(k2cli.models.__file__).parent / "configs"


def _parameters(folder: Path, model: str, **changes: Any) -> int:
    config = json.loads((CONFIGS / model / "config.json").read_text()) | changes
    config = {name: value for name, value in config.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(config))
    planner = Planner(str(folder))
    nodes = parse_hardware("8x m3-ultra-512")
    return planner.plan(nodes, PlanRequest(context_length=2048), limits=False).model.parameters


@pytest.mark.parametrize(
    ("model", "changes", "said"),
    [
        ("deepseek-v3", {"rope_interleave": False}, "rope_interleave False"),
        ("deepseek-v3", {"scoring_func": "softmax"}, "scoring_func 'softmax'"),
        ("deepseek-v3", {"mlp_layer_types": ["dense"] * 10 + ["sparse"] * 51}, "contradicts"),
        ("qwen3-30b", {"mlp_layer_types": ["dense"] * 3 + ["sparse"] * 45}, "mlp_layer_types"),
        ("deepseek-v3", {"topk_group": 9}, "topk_group is 9, but there are 8 groups"),
        ("deepseek-v3", {"n_group": 7}, "make no 7 groups of equal size"),
        ("llama-3.1-8b", {"rope_scaling": {"type": "linear", "factor": float("inf")}}, "finite"),
    ],
)
def test_what_a_class_does_not_compute_is_refused_by_name(
    tmp_path: Path, model: str, changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(UsageError, match=said):
        _parameters(tmp_path, model, **changes)


def test_the_list_of_dense_layers_means_the_same_as_their_number(tmp_path: Path) -> None:
    layers = json.loads((CONFIGS / "glm-4.7-flash" / "config.json").read_text())
    kinds = ["dense"] * 5 + ["sparse"] * (layers["num_hidden_layers"] - 5)
    as_list = {"first_k_dense_replace": None, "mlp_layer_types": kinds}
    number = _parameters(tmp_path, "glm-4.7-flash", first_k_dense_replace=5)
    assert _parameters(tmp_path, "glm-4.7-flash", **as_list) == number


@pytest.mark.parametrize("hardware", ["2x h200-141", "2x rtx-5090", "dgx-spark"])
def test_advice_for_cards_of_nvidia_ends_in_no_internal_error(hardware: str) -> None:
    from k2cli.planning.advice import advise

    planner, nodes = Planner("k2-instruct-4bit"), parse_hardware(hardware)
    plan = planner.plan(nodes, PlanRequest())
    assert not plan.fits
    assert isinstance(advise(planner, nodes, PlanRequest(), plan), list | tuple)
