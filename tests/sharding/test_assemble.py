"""Assembling of models from weights whose shapes are wrong: an error in words, and no crash."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import pytest

from k2cli.errors import K2Error
from k2cli.sharding.assemble import assemble, build
from k2cli.sharding.trace import parameters
from tests.quantization.originals import LLAMA

CONFIG = LLAMA | {"quantization": {"group_size": 32, "bits": 4}}
PATH = "model.layers.0.mlp.up_proj"


@pytest.fixture(scope="module")
def weights() -> dict[str, mx.array]:
    model = build(LLAMA)
    nn.quantize(model, group_size=32, bits=4)
    return parameters(model)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("scales", (192, 0)),
        ("scales", ()),
        ("scales", (192, 4000)),  # more groups than inputs: MLX ended the process by SIGFPE
        ("scales", (192, 3)),
        ("weight", ()),
    ],
)
def test_shapes_of_no_quantized_weight(
    weights: dict[str, mx.array], name: str, shape: tuple[int, ...]
) -> None:
    assert assemble(CONFIG, weights)
    value = weights[f"{PATH}.{name}"]
    wrong = weights | {f"{PATH}.{name}": mx.zeros(shape, value.dtype)}
    with pytest.raises(K2Error, match="are no quantized weight of 128 inputs"):
        assemble(CONFIG, wrong)


def test_a_weight_that_is_missing_is_named(weights: dict[str, mx.array]) -> None:
    left = {name: value for name, value in weights.items() if name != f"{PATH}.weight"}
    with pytest.raises(K2Error, match=f"lacks tensors: {PATH}.weight"):
        assemble(CONFIG, left)
