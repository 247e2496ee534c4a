"""What ``--quantize`` plans against what ``k2 quantize`` makes, to the byte."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from k2cli.errors import K2Error, UsageError
from k2cli.models.checkpoint import read_checkpoint
from k2cli.planning.hardware_spec import parse_hardware
from k2cli.planning.planner import Planner, Wishes
from k2cli.planning.quantized import UniformRecipe, parse_recipe
from k2cli.quantization.convert import quantize
from k2cli.quantization.recipe import Recipe
from tests.quantization import originals

NODES = "2x m3-ultra-512"


@pytest.mark.parametrize("kind", ["bfloat16", "fp8", "llama"])
@pytest.mark.parametrize("recipe", ["4bit-g32", "3bit"])
def test_a_plan_is_of_the_checkpoint_that_is_then_written(
    tmp_path: Path, kind: str, recipe: str
) -> None:
    source = tmp_path / "source"
    if kind == "llama":
        originals.llama(source)
    else:
        originals.kimi(source, fp8=kind == "fp8")
    planned = Planner(str(source), recipe)
    parsed = parse_recipe(recipe)
    for _ in quantize(source, tmp_path / "made", Recipe(parsed.bits, parsed.group_size)):
        pass
    made = Planner(str(tmp_path / "made"))
    assert planned.subject.stored_bytes == read_checkpoint(tmp_path / "made").stored_bytes
    assert planned.subject.facts.parameter_count == made.subject.facts.parameter_count
    # 192 columns do not divide into two times groups of 64.
    strategies = ["pipeline"] if kind == "llama" else ["pipeline", "tensor"]
    for strategy in strategies:
        wishes = Wishes(strategy, 256)
        ahead, afterwards = (each.plan(parse_hardware(NODES), wishes) for each in (planned, made))
        assert ahead.nodes == afterwards.nodes
        assert ahead.model.quantization == afterwards.model.quantization


def test_k2_in_four_bits_is_as_published() -> None:
    plan = Planner("k2-instruct", "4bit").plan(parse_hardware(NODES), Wishes("pipeline"))
    assert plan.model.stored_bytes == 577_593_515_008
    assert sum(node.weights_bytes for node in plan.nodes) == 577_593_515_008
    assert plan.model.quantize == "4bit"


@pytest.mark.parametrize("reference", ["k2-thinking", "k2-instruct-4bit"])
def test_what_is_quantized_is_not_quantized_again(reference: str) -> None:
    with pytest.raises(K2Error, match=f"{reference} cannot be quantized: it is already"):
        Planner(reference, "3bit")


def test_recipes_are_read_as_they_are_written() -> None:
    for recipe in (UniformRecipe(4), UniformRecipe(3, 32)):
        assert parse_recipe(str(recipe)) == recipe
    assert parse_recipe("4") == parse_recipe("4-bit") == parse_recipe("4bit-g64")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "'' is no recipe"), ("four", "'four' is no recipe"), ("7bit", "7 bits are not"),
        ("4bit-g48", "groups of 48 are not"), ("9" * 400, "is no recipe"),
    ],
)  # fmt: skip
def test_other_recipes_are_refused(text: str, message: str) -> None:
    wrong: Any = pytest.raises(UsageError, match=message)
    with wrong:
        parse_recipe(text)
