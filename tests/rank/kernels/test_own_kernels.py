"""k2's own CUDA kernels: what they compute on a GPU, and which module asks them for what on a CPU.

On a CPU plain operations stand in for the kernels (``tests.support.own_kernels``), so that the
modules around them are compared with mlx-lm's. With a GPU the kernels are compared with these.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest

from k2cli.rank.attention.latent import use_own_attention
from k2cli.rank.attention.one_token import compile_one_token
from k2cli.rank.joined_projections import join_projections
from k2cli.rank.kernels import (
    chosen_product,
    device,
    expert_choice,
    feed_forward,
    gated_experts,
    heads,
    linears,
    own_kernels,
    shared_product,
)
from k2cli.rank.kernels.feed_forward import _CompiledMoE
from k2cli.rank.kernels.gated_experts import GatedExperts
from k2cli.rank.kernels.linears import RowsTogether
from k2cli.sharding.assemble import build, cast
from k2cli.sharding.stage import make_cache
from lab.toy_k2.checkpoint import ToyShape, toy_config
from tests.support import own_kernels as plain
from tests.support.latent_models import MLX_LM, TOKENS

SHAPE = ToyShape(
    layers=3, hidden=256, heads=4, experts=8, experts_per_token=3, q_lora=64, kv_lora=64, rope=32,
    nope=64, value=64, dense_intermediate=512, expert_intermediate=128, vocabulary=320, bits=4,
    group_size=32,
)  # fmt: skip
on_gpu = pytest.mark.skipif(
    not mx.cuda.is_available() or mx.default_device() == mx.cpu, reason="needs an NVIDIA GPU"
)


def _model(dtype: mx.Dtype = mx.float32) -> nn.Module:
    mx.random.seed(5)
    model = build(toy_config(SHAPE))
    nn.quantize(model, group_size=32, bits=4)
    for module in model.modules():
        if "e_score_correction_bias" in module:
            module.e_score_correction_bias = mx.random.normal((SHAPE.experts,)) * 0.1
    cast(model, dtype)
    mx.eval(model.parameters())
    return model


def _logits(model: nn.Module) -> list[mx.array]:
    """Compute one row and three: a chunk each, then a token of each."""
    found = []
    for rows in (1, 3):
        cache = make_cache(model)
        prompts = [TOKENS[first : first + 30] for first in (0, 9, 60)[:rows]]
        found.append(model(mx.array(prompts), cache=cache))
        found += [model(mx.array([[token]] * rows), cache=cache) for token in (5, 6)]
    mx.eval(found)
    return found


def _error(found: mx.array, wanted: mx.array) -> float:
    difference: Any = mx.abs(found.astype(mx.float32) - wanted.astype(mx.float32)).max()
    return float(difference.item()) / max(float(mx.abs(wanted).max().item()), 1e-30)  # type: ignore[arg-type]


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let plain operations stand in for the kernels of a GPU."""
    for module in (device, heads, own_kernels):
        monkeypatch.setattr(module, "copies_from_host", lambda: True)
    monkeypatch.setattr(own_kernels, "_is_capable", lambda: True)
    for module in (gated_experts, heads):
        monkeypatch.setattr(module, "chosen_product", plain.chosen_product)
    monkeypatch.setattr(linears, "shared_product", plain.shared_product)
    monkeypatch.setattr(linears, "DTYPES", (mx.float32,))
    for module in (feed_forward, own_kernels):
        monkeypatch.setattr(module, "chosen_experts", plain.chosen_experts)
    return


@pytest.mark.usefixtures("stand_ins")
@pytest.mark.parametrize("joined", [False, True])
def test_a_model_with_own_kernels_computes_what_mlx_lm_computes(joined: bool) -> None:
    model = _model()
    wanted = _logits(model)
    if joined:
        join_projections(model)
        mx.eval(model.parameters())
    device.avoid_wrong_kernels(model)
    use_own_attention(model, MLX_LM)
    assert compile_one_token(model) == SHAPE.layers
    modules = model.modules()
    for kind in (RowsTogether, GatedExperts, _CompiledMoE):
        assert any(isinstance(module, kind) for module in modules), kind
    assert own_kernels.find_wrong_kernel(model) is None
    device.check_kernels(model)
    for mine, other in zip(_logits(model), wanted, strict=True):
        assert _error(mine, other) < 1e-4


@pytest.mark.usefixtures("stand_ins")
@pytest.mark.parametrize("place", ["chosen_product", "shared_product", "chosen_experts"])
@pytest.mark.parametrize("how", ["wrong", "cannot be compiled"])
def test_a_model_leaves_kernels_that_fail(
    place: str, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = _model()
    wanted = _logits(model)

    def failing(*arguments: Any, **options: Any) -> Any:
        if how == "cannot be compiled":
            raise RuntimeError("[custom_kernel] no compiler\nand more")
        found = getattr(plain, place)(*arguments, **options)
        return (found[0] * 0, found[1]) if place == "chosen_experts" else found[:, ::-1]

    for module in (gated_experts, heads, linears, feed_forward, own_kernels):
        if hasattr(module, place):
            monkeypatch.setattr(module, place, failing)
    said: list[str] = []
    monkeypatch.setattr(device, "say_on_stderr", said.append)
    device.avoid_wrong_kernels(model)
    use_own_attention(model, MLX_LM)
    compile_one_token(model)
    device.check_kernels(model)
    assert len(said) == 1
    assert ("no compiler" in said[0]) == (how == "cannot be compiled")
    assert not any(isinstance(each, GatedExperts | RowsTogether) for each in model.modules())
    for mine, other in zip(_logits(model), wanted, strict=True):
        assert _error(mine, other) < 1e-4


def test_a_cpu_uses_no_kernel_of_k2() -> None:
    model = _model()
    if mx.default_device() == mx.cpu:
        device.avoid_wrong_kernels(model)
        kinds = (RowsTogether, GatedExperts, _CompiledMoE)
        assert not any(isinstance(module, kinds) for module in model.modules())


def _parts(
    widths: tuple[int, ...], inputs: int, bits: int, group_size: int, dtype: mx.Dtype
) -> list[dict[str, mx.array]]:
    parts = []
    for width in widths:
        weight = mx.random.normal((6, width, inputs)) * 0.1
        arrays = mx.quantize(weight.astype(dtype), group_size=group_size, bits=bits)
        parts.append(dict(zip(("weight", "scales", "biases"), arrays, strict=True)))
    mx.eval(parts)
    return parts


@on_gpu
@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16, mx.float32])
@pytest.mark.parametrize(
    ("inputs", "widths", "bits", "group_size"),
    [
        (7168, (128, 128), 4, 64), (2048, (256,), 4, 64), (128, (512,), 4, 64),
        (512, (64,), 4, 128), (2048, (64,), 4, 32), (1024, (64,), 8, 32), (1024, (64,), 2, 64),
        (960, (64,), 4, 64),
    ],
)  # fmt: skip
def test_products_with_chosen_matrices(
    inputs: int, widths: tuple[int, ...], bits: int, group_size: int, dtype: mx.Dtype
) -> None:
    mx.random.seed(1)
    parts = _parts(widths, inputs, bits, group_size, dtype)
    settings = {"group_size": group_size, "bits": bits, "mode": "affine"}
    bound = 1e-5 if dtype == mx.float32 else 0.01
    asked = 0
    for rows, choices in ((1, 3), (5, 3)):
        chosen = mx.random.randint(0, 6, (rows, 6)).astype(mx.uint32)[:, 2 : 2 + choices]
        # One value more: rows that no vector load may read at once.
        wide = mx.random.normal((rows * choices, inputs + 1)).astype(dtype)
        for x in (wide[:rows, :-1], wide[:rows, 1:], mx.contiguous(wide[:, :-1])):
            for gated, added in ((False, False), (True, False), (False, True)):
                if not chosen_product.is_known(parts, settings, inputs, gated=gated):
                    continue
                factors = mx.random.uniform(shape=(rows, choices)) if added else None
                options: Any = {"gated": gated, "factors": factors}
                found = chosen_product.chosen_product(x, chosen, parts, settings, **options)
                wanted = plain.chosen_product(x, chosen, parts, settings, **options)
                assert found.shape == wanted.shape
                assert _error(found, wanted) < bound, (rows, choices, gated, added)
                asked += 1
    assert asked >= 12


@on_gpu
@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize(("inputs", "outputs"), [(7168, 576), (128, 100), (1024, 4096)])
def test_products_with_a_shared_matrix(
    inputs: int, outputs: int, group_size: int, dtype: mx.Dtype
) -> None:
    mx.random.seed(2)
    arrays = {
        name: value[0]
        for name, value in _parts((outputs,), inputs, 4, group_size, dtype)[0].items()
    }
    assert shared_product.is_known(arrays, {"group_size": group_size, "bits": 4, "mode": "affine"})
    for rows in (1, 2, 8, 9, 16):
        wide = mx.random.normal((rows, inputs + 8)).astype(dtype)
        for x in (wide[:, :inputs], wide[:, 3 : 3 + inputs]):
            found = shared_product.shared_product(x, arrays, group_size)
            assert _error(found, plain.shared_product(x, arrays, group_size)) < 0.01, rows


@on_gpu
@pytest.mark.parametrize("experts", [8, 64, 384])
def test_the_choice_of_experts(experts: int) -> None:
    mx.random.seed(3)
    logits, correction = mx.random.normal((9, experts)), mx.random.normal((experts,)) * 0.1
    for normalised in (True, False):
        options: Any = {"choices": 4, "normalised": normalised, "scale": 2.827}
        found = expert_choice.chosen_experts(logits, correction, **options)
        wanted = plain.chosen_experts(logits, correction, **options)
        assert mx.array_equal(found[0], wanted[0])
        assert _error(found[1], wanted[1]) < 1e-5
    broken = mx.full((2, experts), float("nan"))
    chosen, _ = expert_choice.chosen_experts(
        broken, correction, choices=4, normalised=True, scale=1.0
    )
    assert int(chosen.max().item()) < experts  # type: ignore[arg-type]


@on_gpu
def test_a_model_on_a_gpu_computes_what_mlx_lm_computes_on_a_cpu() -> None:
    with mx.stream(mx.cpu):
        wanted = _logits(_model())
    for dtype, bound in ((mx.float32, 1e-3), (mx.bfloat16, 0.1)):
        model = _model(dtype)
        device.avoid_wrong_kernels(model)
        use_own_attention(model, MLX_LM)
        assert own_kernels.find_wrong_kernel(model) is None
        assert any(isinstance(each, RowsTogether) for each in model.modules())
        device.check_kernels(model)
        for mine, other in zip(_logits(model), wanted, strict=True):
            assert _error(mine, other) < bound
