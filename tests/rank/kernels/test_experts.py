"""Experts in parts, as on CUDA, and the check of a device's kernels."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest

from k2cli.errors import ClusterError
from k2cli.mlx_lm_package import mlx_lm_module
from k2cli.rank.kernels import experts
from k2cli.rank.kernels.experts import PartedExperts, check_experts, part_experts

COUNT, INPUTS, OUTPUTS = 6, 64, 512


class _Layer(nn.Module):  # type: ignore[misc]
    def __init__(self, bits: int, mode: str, bias: bool) -> None:
        super().__init__()
        kind = mlx_lm_module("models.switch_layers").QuantizedSwitchLinear
        group_size = 32 if mode == "mxfp4" else 64
        self.up_proj = kind(INPUTS, OUTPUTS, COUNT, bias, group_size, bits, mode)
        if bias:
            self.up_proj.bias = mx.random.normal((COUNT, OUTPUTS))


def _asked(rows: int) -> tuple[mx.array, mx.array]:
    indices = mx.sort(mx.random.randint(0, COUNT, (rows,)).astype(mx.uint32))
    return mx.random.normal((rows, 1, INPUTS)), indices


@pytest.mark.parametrize(("bits", "mode", "bias"), [(4, "affine", False), (4, "mxfp4", True)])
@pytest.mark.parametrize("largest", [COUNT * INPUTS * OUTPUTS, COUNT * INPUTS * 200])
def test_experts_in_parts_compute_the_same(bits: int, mode: str, bias: bool, largest: int) -> None:
    mx.random.seed(3)
    layer = _Layer(bits, mode, bias)
    whole = layer.up_proj
    one, few = mx.random.normal((1, 1, 1, INPUTS)), mx.array([[0, 3, 5]], dtype=mx.uint32)
    rows, indices = _asked(100)
    wanted = [whole(one, few), whole(rows, indices, sorted_indices=True)]
    mx.eval(wanted)
    part_experts(layer, largest)
    assert isinstance(layer.up_proj, PartedExperts)
    widths = [part["weight"].shape[1] for part in layer.up_proj.parts]
    assert widths == ([OUTPUTS] if largest == COUNT * INPUTS * OUTPUTS else [128] * 4)
    found = [layer.up_proj(one, few), layer.up_proj(rows, indices, sorted_indices=True)]
    for mine, other in zip(found, wanted, strict=True):
        assert mine.shape == other.shape
        assert mx.array_equal(mine, other)
    assert check_experts(layer) == 1


def test_more_rows_than_a_launch_takes_are_computed_in_pieces(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    layer = _Layer(4, "affine", False)
    rows, indices = _asked(100)
    wanted = layer.up_proj(rows, indices, sorted_indices=True)
    mx.eval(wanted)
    monkeypatch.setattr(experts, "MOST_ROWS", 30)
    launched: list[int] = []
    product = mx.gather_qmm

    def counted(*arguments: Any, **named: Any) -> mx.array:
        launched.append(named["rhs_indices"].size)
        return product(*arguments, **named)

    monkeypatch.setattr(mx, "gather_qmm", counted)
    part_experts(layer)
    assert mx.array_equal(layer.up_proj(rows, indices, sorted_indices=True), wanted)
    assert launched == [30, 30, 30, 10]


@pytest.mark.parametrize("form", [False, True])
def test_a_kernel_that_takes_another_experts_weights_is_found(
    monkeypatch: pytest.MonkeyPatch, form: bool
) -> None:
    """What MLX does on CUDA: places beyond a limit begin again at 0."""
    product = mx.gather_qmm

    def wrapped(*arguments: Any, **named: Any) -> mx.array:
        if named["sorted_indices"] == form:
            asked = named["rhs_indices"]
            named["rhs_indices"] = mx.where(asked >= COUNT - 1, asked - 3, asked)
        return product(*arguments, **named)

    layer = _Layer(4, "affine", False)
    assert check_experts(layer) == 1
    monkeypatch.setattr(mx, "gather_qmm", wrapped)
    with pytest.raises(ClusterError, match="multiplies expert 5 of 6 "):
        check_experts(layer)
    assert check_experts(nn.Linear(4, 4)) == 0


def test_a_checkpoint_that_is_not_finite_is_not_the_devices_fault() -> None:
    layer = _Layer(4, "affine", False)
    layer.up_proj.scales = mx.full(layer.up_proj.scales.shape, mx.nan)
    assert check_experts(layer) == 1
