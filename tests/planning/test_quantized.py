"""Plans with ``--quantize`` against the checkpoints of ``k2 quantize``, to the byte."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from k2cli.errors import K2Error, UsageError
from k2cli.models.checkpoint import read_checkpoint
from k2cli.planning.hardware.spec import parse_hardware
from k2cli.planning.planner import Planner
from k2cli.planning.request import PlanRequest
from k2cli.quantization.convert import quantize
from k2cli.sharding.recipe import (
    BITS,
    FIXED_MODES,
    GROUP_SIZES,
    MIXED,
    Recipe,
    chosen_recipe,
    parse_recipe,
)
from tests.quantization import originals

NODES = "2x m3-ultra-512"
EVERY_RECIPE = [
    *(Recipe(bits, group_size) for bits in BITS for group_size in GROUP_SIZES),
    *(Recipe(*sizes, mode) for mode, sizes in FIXED_MODES.items()),
    *(Recipe(group_size=32, mixed=name) for name in MIXED),
]


def quantized(source: Path, folder: Path, recipe: str) -> Path:
    """Make the checkpoint of ``k2 quantize --recipe``."""
    for _ in quantize(source, folder, chosen_recipe(recipe)):
        pass
    return folder


@pytest.mark.parametrize("kind", ["bfloat16", "fp8", "llama"])
def test_a_plan_is_of_the_checkpoint_that_is_then_written(tmp_path: Path, kind: str) -> None:
    """Compare every recipe tensor by tensor: names, types, shapes and bytes."""
    source = tmp_path / "source"
    if kind == "llama":
        originals.llama(source)
    else:
        originals.kimi(source, fp8=kind == "fp8")
    for recipe in EVERY_RECIPE[:: 4 if kind == "bfloat16" else 1]:
        planned = Planner(str(source), str(recipe)).model
        made = read_checkpoint(quantized(source, tmp_path / str(recipe), str(recipe)))
        assert planned.stored == {n: (t.dtype, t.shape) for n, t in made.tensors.items()}, recipe
        assert planned.stored_bytes == made.stored_bytes, recipe


@pytest.mark.parametrize("recipe", ["4bit-g32", "3bit", "mxfp4", "nvfp4", "mxfp8", "mixed_2_6"])
def test_a_plan_before_and_after_quantizing_is_the_same(tmp_path: Path, recipe: str) -> None:
    source = originals.kimi(tmp_path / "source", fp8=True)
    planned = Planner(str(source), recipe)
    made = Planner(str(quantized(source, tmp_path / "made", recipe)))
    assert planned.model.facts.parameter_count == made.model.facts.parameter_count
    for strategy in ("pipeline", "tensor"):
        request = PlanRequest(strategy, 256)
        ahead, afterwards = (each.plan(parse_hardware(NODES), request) for each in (planned, made))
        assert ahead.nodes == afterwards.nodes
        assert ahead.model.quantization == afterwards.model.quantization


def test_k2_in_four_bits_is_as_published() -> None:
    plan = Planner("k2-instruct", "4bit").plan(parse_hardware(NODES), PlanRequest("pipeline"))
    assert plan.model.stored_bytes == 577_593_515_008
    assert sum(node.weights_bytes for node in plan.nodes) == 577_593_515_008
    assert plan.model.quantize == "4bit"


@pytest.mark.parametrize("reference", ["k2-thinking", "k2-instruct-4bit"])
def test_what_is_quantized_is_not_quantized_again(reference: str) -> None:
    with pytest.raises(K2Error, match=f"{reference} cannot be quantized: it is already"):
        Planner(reference, "3bit")


def test_recipes_are_read_as_they_are_written() -> None:
    for recipe in EVERY_RECIPE:
        assert parse_recipe(str(recipe)) == recipe
    assert parse_recipe("4") == parse_recipe("4-bit") == parse_recipe("4bit-g64")
    assert chosen_recipe("mxfp4") == chosen_recipe(mode="mxfp4") == Recipe(4, 32, "mxfp4")
    assert chosen_recipe() == chosen_recipe(bits=4) == Recipe()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "'' is not a quantization recipe"),
        ("four", "'four' is not a quantization recipe"),
        ("7bit", "7 bits are not"),
        ("4bit-g48", "groups of 48 are not"),
        ("9" * 400, "is not a quantization recipe"),
        ("mxfp6", "'mxfp6' is not a quantization recipe"),
        ("mixed_5_6", "'mixed_5_6' is not a quantization recipe"),
    ],
)
def test_other_recipes_are_refused(text: str, message: str) -> None:
    wrong: Any = pytest.raises(UsageError, match=message)
    with wrong:
        parse_recipe(text)


def test_a_mixed_recipe_wants_modules_by_the_names_it_knows(tmp_path: Path) -> None:
    config = {"model_type": "gpt2", "n_ctx": 64, "n_embd": 64, "n_head": 4, "n_layer": 2,
              "n_positions": 64, "layer_norm_epsilon": 1e-5, "vocab_size": 96}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match="named down_proj, which gpt2 does not have"):
        Planner(str(tmp_path), "mixed_3_6")


def test_a_recipe_is_said_once() -> None:
    with pytest.raises(UsageError, match="--recipe and --bits contradict"):
        chosen_recipe("4bit", bits=4)
    with pytest.raises(UsageError, match="mxfp4 in 8 bits"):
        chosen_recipe(bits=8, mode="mxfp4")
