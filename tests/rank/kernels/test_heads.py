"""Projections of all heads in k2's own form, as on CUDA, and the check of a device's kernels."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest

from k2cli.errors import ClusterError
from k2cli.mlx_lm_package import mlx_lm_module
from k2cli.rank.kernels.few_inputs import missing_inputs
from k2cli.rank.kernels.heads import (
    HeadProjection,
    check_heads,
    dequantized,
    use_own_heads,
)

HEADS, OUTPUTS = 4, 128


class _Layer(nn.Module):  # type: ignore[misc]
    def __init__(self, inputs: int, bits: int = 4, mode: str = "affine") -> None:
        super().__init__()
        kind = mlx_lm_module("models.mla").QuantizedMultiLinear
        self.embed_q = kind(inputs, OUTPUTS, HEADS, 32 if mode == "mxfp4" else 64, bits, mode)


@pytest.mark.parametrize(("bits", "mode"), [(4, "affine"), (8, "affine"), (4, "mxfp4")])
@pytest.mark.parametrize("inputs", [64, 128, 256])
@pytest.mark.parametrize("rows", [1, 3])
def test_the_own_form_computes_the_same(bits: int, mode: str, inputs: int, rows: int) -> None:
    mx.random.seed(5)
    layer = _Layer(inputs, bits, mode)
    one_way = mx.random.normal((rows, HEADS, 2, inputs))
    other_way = mx.random.normal((rows, 1, 7, OUTPUTS))  # latents, which all heads share
    weights = dequantized(layer.embed_q)
    wanted = [layer.embed_q(one_way), layer.embed_q(other_way, transpose=False)]
    mx.eval(wanted, weights)
    assert use_own_heads(layer) == 1
    own = layer.embed_q
    assert isinstance(own, HeadProjection)
    assert own["scales"].shape[-1] * own.group_size >= 192, "three tiles of 64 inputs"
    assert own.missing == missing_inputs(inputs, own.group_size)
    found = [own(one_way), own(other_way, transpose=False)]
    for mine, other in zip(found, wanted, strict=True):
        assert mine.shape == other.shape
        assert mx.allclose(mine, other, rtol=1e-5, atol=1e-5)
    assert mx.array_equal(dequantized(own), weights)
    assert check_heads(layer) == 1


def _first_head_for_all(
    x: mx.array, weight: mx.array, *arrays: Any, transpose: bool = True, **named: Any
) -> mx.array:
    """Compute what MLX does on CUDA when matrices of heads are broadcast over rows."""
    if x.ndim == 4 and x.shape[0] > 1:
        weight, *arrays = (  # type: ignore[assignment]
            None if each is None else mx.repeat(each[:1], len(each), axis=0)
            for each in (weight, *arrays)
        )
    found: mx.array = _PRODUCT(x, weight, *arrays, transpose=transpose, **named)
    return found


_PRODUCT = mx.quantized_matmul


def test_a_device_that_takes_the_first_heads_matrix_for_all_gets_the_own_form(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def wrong(x: mx.array, weight: mx.array, *arrays: Any, **named: Any) -> mx.array:
        arrays = arrays or (named.pop("scales"), named.pop("biases"))
        return _first_head_for_all(x, weight, *arrays, **named)

    layer = _Layer(128)
    x = mx.random.normal((3, HEADS, 1, 128))
    wanted = layer.embed_q(x)
    mx.eval(wanted)
    monkeypatch.setattr(mx, "quantized_matmul", wrong)
    assert not mx.allclose(layer.embed_q(x), wanted, atol=1e-3)
    assert check_heads(layer) == 1
    assert isinstance(layer.embed_q, HeadProjection)
    assert mx.allclose(layer.embed_q(x), wanted, atol=1e-5)


def test_a_device_that_is_wrong_in_any_form_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*arguments: Any, **named: Any) -> mx.array:
        return _PRODUCT(*arguments, **named) * 1.5

    layer = _Layer(128)
    assert check_heads(layer) == 1
    monkeypatch.setattr(mx, "quantized_matmul", wrong)
    with pytest.raises(ClusterError, match=r"head 0 of 4 \(128 by 128, 4 bits\) wrong: by 0.5"):
        check_heads(layer)
    assert check_heads(nn.Linear(4, 4)) == 0
