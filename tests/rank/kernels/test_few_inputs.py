"""Quantized matrices with few inputs, lengthened as on CUDA."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest

from k2cli.mlx_lm_package import mlx_lm_module
from k2cli.rank.kernels.experts import check_experts, part_experts
from k2cli.rank.kernels.few_inputs import lengthen_linears


class _Model(nn.Module):  # type: ignore[misc]
    def __init__(self, inputs: int, **quantized: Any) -> None:
        super().__init__()
        self.projection = nn.QuantizedLinear(inputs, 128, bias=True, **quantized)
        self.projection.bias = mx.random.normal((128,))
        quantized = {"group_size": 64, "bits": 4, "mode": "affine"} | quantized
        kind = mlx_lm_module("models.switch_layers").QuantizedSwitchLinear
        self.experts = kind(inputs, 128, 6, False, *quantized.values())


@pytest.mark.parametrize("inputs", [64, 128, 192])
@pytest.mark.parametrize("quantized", [{}, {"bits": 8}, {"group_size": 32, "mode": "mxfp4"}])
def test_zeros_after_the_inputs_change_no_result(inputs: int, quantized: dict[str, Any]) -> None:
    mx.random.seed(4)
    model = _Model(inputs, **quantized)
    x, rows = mx.random.normal((2, 5, inputs)), mx.random.normal((2, 1, 1, inputs))
    of = mx.array([[0, 3], [5, 5]], dtype=mx.uint32)
    wanted = [model.projection(x), model.experts(rows, of)]
    mx.eval(wanted)
    assert lengthen_linears(model) == (inputs < 192)
    part_experts(model)
    assert lengthen_linears(model) == 0, "once"
    for module in (model.projection, model.experts):
        arrays = module if module is model.projection else module.parts[0]
        group_size = 32 if "group_size" in quantized else 64
        assert arrays["scales"].shape[-1] * group_size == 192, "three tiles of 64 inputs"
    for found, other in zip([model.projection(x), model.experts(rows, of)], wanted, strict=True):
        assert mx.allclose(found, other, rtol=1e-5, atol=1e-5)
    assert check_experts(model) == 1
