"""Models with k2's own CUDA kernels compute what mlx-lm computes, and leave kernels that are wrong.

On a CPU plain operations stand in for the kernels (``tests.support.own_kernels``); the kernels
themselves are compared with these in ``test_kernel_text``.
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
    device,
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
from k2cli.sharding.tensor import ShardedHead, StandInGroup
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
    for module in (linears, own_kernels):
        monkeypatch.setattr(module, "DTYPES", (mx.float32,))
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
    if how == "wrong":
        assert any(
            _error(mine, other) > 0.01 for mine, other in zip(_logits(model), wanted, strict=True)
        ), "what is compiled with wrong kernels must be compiled again"
    device.check_kernels(model)
    assert len(said) == 1
    assert ("no compiler" in said[0]) == (how == "cannot be compiled")
    assert not any(isinstance(each, GatedExperts | RowsTogether) for each in model.modules())
    for mine, other in zip(_logits(model), wanted, strict=True):
        assert _error(mine, other) < 1e-4


@pytest.mark.usefixtures("stand_ins")
def test_the_check_asks_a_kernel_only_for_types_that_it_knows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: set[mx.Dtype] = set()

    def noted(x: mx.array, *arguments: Any) -> mx.array:
        asked.add(x.dtype)
        return plain.shared_product(x, *arguments)

    monkeypatch.setattr(linears, "shared_product", noted)
    for module in (linears, own_kernels):
        monkeypatch.setattr(module, "DTYPES", shared_product.DTYPES)
    model = _model(mx.float32)
    device.avoid_wrong_kernels(model)
    assert own_kernels.find_wrong_kernel(model) is None
    assert asked
    assert asked <= set(shared_product.DTYPES)


@pytest.mark.usefixtures("stand_ins")
def test_a_head_in_slices_uses_the_kernel_for_few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[int] = []

    def noted(x: mx.array, *arguments: Any) -> mx.array:
        rows.append(len(x))
        return plain.shared_product(x, *arguments)

    monkeypatch.setattr(linears, "shared_product", noted)
    whole = nn.QuantizedLinear.from_linear(nn.Linear(256, 128), 32, 4)
    model = nn.Module()
    model.head = ShardedHead(whole, StandInGroup(1, 2))
    mx.eval(model.parameters())
    assert linears.use_own_linears(model) == 1
    assert own_kernels.find_wrong_kernel(model) is None
    rows.clear()
    for count in (2, 40):
        x = mx.random.normal((count, 1, 256))
        wanted = (whole(x) - whole["bias"])[..., 64:]
        assert _error(model.head.product(x), wanted) < 1e-4
    assert rows == [2]
    own_kernels.leave_own_kernels(model)
    assert type(model.head) is ShardedHead


@pytest.mark.usefixtures("stand_ins")
@pytest.mark.parametrize("joined", [False, True])
def test_experts_of_own_kernels_are_never_mlxs(
    joined: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = _model()
    if joined:
        join_projections(model)
    device.avoid_wrong_kernels(model)
    layers = [each for each in model.modules() if isinstance(each, GatedExperts)]
    assert layers
    layer: Any = layers[0]
    x, chosen = mx.random.normal((1, 40, 256)), mx.random.randint(0, 8, (1, 40, 3))
    wanted = layer(x, chosen)
    monkeypatch.setattr(gated_experts, "MOST_PAIRS", 50)
    assert _error(layer(x, chosen), wanted) < 1e-6
    monkeypatch.setattr(mx, "gather_qmm", None)
    device.check_kernels(model)


def test_a_cpu_uses_no_kernel_of_k2() -> None:
    model = _model()
    if mx.default_device() == mx.cpu:
        device.avoid_wrong_kernels(model)
        kinds = (RowsTogether, GatedExperts, _CompiledMoE)
        assert not any(isinstance(module, kinds) for module in model.modules())


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


@pytest.mark.usefixtures("stand_ins")
@pytest.mark.parametrize(
    "kind", [nn.QuantizedAllToShardedLinear, nn.QuantizedShardedToAllLinear], ids=str
)
def test_linear_layers_of_slices_compute_the_same(kind: Any) -> None:
    mx.random.seed(4)
    layer = kind(128, 64, bias=True, group_size=32, bits=4, group=mx.distributed.init())
    layer.bias = mx.random.normal((64,))
    inputs = [mx.random.normal((rows, 1, 128)) for rows in (1, 8, 40)]
    wanted = [layer(x) for x in inputs]
    assert linears.use_own_linears(layer) == 1
    for x, other in zip(inputs, wanted, strict=True):
        found = layer(x)
        assert found.shape == other.shape
        assert _error(found, other) < 1e-5
