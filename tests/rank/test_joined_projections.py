"""Joined gate and up projections give the same numbers, and are loaded without a second form."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest

from k2cli.protocol import HeldTensor
from k2cli.rank import loader, tensor_reader
from k2cli.rank.joined_projections import JoinedProjection, join_projections
from k2cli.rank.kernels.experts import PartedExperts, check_experts, part_experts
from k2cli.rank.loader import LoadedPart, load_part, placement_of
from k2cli.sharding.assemble import build, cast
from k2cli.sharding.coverage import check_coverage
from k2cli.sharding.stage import make_cache
from k2cli.sharding.tensor import StandInGroup
from k2cli.sharding.trace import parameters
from tests.quantization.originals import KIMI, LLAMA
from tests.support.memory import held_bytes
from tests.support.rank_pool import RankPool, assignments, running
from tests.support.weights import random_mlx_model

TOKENS = [7 + index * 31 % 300 for index in range(100)]
BIASED = LLAMA | {"mlp_bias": True}
# Clamped activations and biases of experts.
GPT_OSS = LLAMA | {
    "model_type": "gpt_oss", "num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 32,
    "layer_types": ["sliding_attention", "full_attention"],
}  # fmt: skip
GELU = LLAMA | {"model_type": "gemma", "head_dim": 32}


def _quantized(bits: int, mode: str = "affine") -> Callable[[nn.Module], None]:
    return lambda model: nn.quantize(model, group_size=32, bits=bits, mode=mode)


def _mixed(model: nn.Module) -> None:
    """Quantize like a recipe that gives gates fewer bits, in the first layer."""

    def choose(path: str, module: nn.Module) -> bool | dict[str, Any]:
        bits = 6 if path.endswith("0.mlp.up_proj") else 4
        return hasattr(module, "to_quantized") and {"group_size": 32, "bits": bits}

    nn.quantize(model, group_size=32, bits=4, class_predicate=choose)


def _plain(model: nn.Module) -> None:
    """Leave a model as it is."""


CASES: dict[str, tuple[dict[str, Any], Callable[[nn.Module], None], int]] = {
    # The toy has a dense layer, and two with experts and a shared expert.
    "kimi_k2, 4 bit": (KIMI, _quantized(4), 5),
    "kimi_k2, 8 bit": (KIMI, _quantized(8), 5),
    "kimi_k2, mxfp4": (KIMI, _quantized(4, "mxfp4"), 5),
    "llama, 4 bit": (LLAMA, _quantized(4), 2),
    "llama, mixed": (LLAMA, _mixed, 1),
    "llama, biases, 4 bit": (BIASED, _quantized(4), 2),
    "gemma, 4 bit": (GELU, _quantized(4), 2),
    "gpt_oss, 4 bit": (GPT_OSS, _quantized(4), 2),
    "kimi_k2": (KIMI, _plain, 5),
    "llama, biases": (BIASED, _plain, 2),
}


QUICK = ("llama, mixed", "llama, biases")


def _model(name: str, dtype: mx.Dtype) -> nn.Module:
    config, quantize, _ = CASES[name]
    mx.random.seed(3)
    model = build(config)
    for path, value in parameters(model).items():
        if path.endswith("proj.bias"):
            model.load_weights([(path, mx.random.normal(value.shape))], strict=False)
    quantize(model)
    cast(model, dtype)
    mx.eval(model.parameters())
    return model


def _logits(model: nn.Module) -> mx.array:
    """Compute prompts that sort their tokens by expert and do not, and single tokens."""
    cache, found, done = make_cache(model), [], 0
    for count in (20, 9, 1):
        tokens = mx.array([TOKENS[done : done + count]] * 2)
        found.append(model(tokens, cache=cache))
        done += count
    return mx.concatenate(found, axis=1)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *((name, mx.float32) for name in CASES),
        # The CPU is slow in this type; the others are in the long tests.
        *(
            pytest.param(name, mx.bfloat16, marks=() if name in QUICK else pytest.mark.soak)
            for name in CASES
            if name != "kimi_k2"  # MLX's CPU has no such products of experts
        ),
    ],
)
def test_logits_are_the_same(name: str, dtype: mx.Dtype) -> None:
    model = _model(name, dtype)
    expected = _logits(model)
    mx.eval(expected)
    size = sum(value.nbytes for value in parameters(model).values())
    joined = join_projections(model)
    pairs = {parameter.rpartition(".both.")[0] for parameter in joined}
    assert len(pairs) == CASES[name][2]
    assert sum(value.nbytes for value in parameters(model).values()) == size
    found = _logits(model)
    if "bit" in name or "mx" in name or "mixed" in name:
        assert mx.array_equal(found, expected)
        return
    # A BLAS may add in another order for a wider matrix.
    difference = mx.abs(found.astype(mx.float32) - expected.astype(mx.float32)).max()
    assert difference.item() < (1e-4 if dtype == mx.float32 else 0.1)  # type: ignore[operator]
    if dtype == mx.float32:
        assert mx.array_equal(mx.argmax(found, axis=-1), mx.argmax(expected, axis=-1))


def test_every_call_is_right_whatever_the_order() -> None:
    mx.random.seed(5)
    owner = nn.Module()
    owner.gate_proj, owner.up_proj = nn.Linear(32, 48), nn.Linear(32, 16)
    one, other = mx.random.normal((3, 32)), mx.random.normal((3, 32))
    wanted = {
        (name, id(x)): owner[name](x) for name in ("gate_proj", "up_proj") for x in (one, other)
    }
    assert len(join_projections(owner)) == 2
    gate, up = owner.gate_proj, owner.up_proj
    for name, x in (
        ("gate_proj", one), ("up_proj", other), ("up_proj", one), ("up_proj", one),
        ("gate_proj", one), ("gate_proj", one), ("gate_proj", other), ("up_proj", other),
    ):  # fmt: skip
        found = (gate if name == "gate_proj" else up)(x)
        assert mx.allclose(found, wanted[name, id(x)], atol=1e-5)


class _Adapted(nn.Linear):
    """A projection with more than its matrix, such as LoRA's."""


@pytest.mark.parametrize(
    ("gate", "up"),
    [
        (nn.Linear(64, 32), _Adapted(64, 32)),
        (_Adapted(64, 32), _Adapted(64, 32)),
        (nn.Linear(64, 32), nn.Linear(64, 32, bias=False)),
        (nn.QuantizedLinear(64, 32, bits=4), nn.QuantizedLinear(64, 32, bits=6)),
        (nn.QuantizedLinear(64, 32, group_size=32), nn.QuantizedLinear(64, 32, group_size=64)),
        (nn.Linear(64, 32), nn.QuantizedLinear(64, 32)),
        (nn.Linear(64, 32), nn.Linear(32, 32)),
    ],
)
def test_projections_of_unlike_forms_stay_as_they_are(gate: nn.Module, up: nn.Module) -> None:
    owner = nn.Module()
    owner.gate_proj, owner.up_proj = gate, up
    assert not join_projections(owner)
    assert (owner.gate_proj, owner.up_proj) == (gate, up)


def test_joined_experts_are_checked_and_held_in_parts() -> None:
    model = _model("kimi_k2, 4 bit", mx.float32)
    expected = _logits(model)
    join_projections(model)
    mx.eval(model.parameters())
    assert check_experts(model) == 2  # the joined matrix, and the down projection
    part_experts(model, largest_elements=4 * 256 * 128)
    experts = model.layers[1].mlp.switch_mlp.gate_proj
    assert isinstance(experts, JoinedProjection)
    assert isinstance(experts.both, PartedExperts)
    assert [part["weight"].shape[1] for part in experts.both.parts] == [128, 128]
    assert check_experts(model) == 2
    assert mx.allclose(_logits(model), expected, atol=1e-5)


PACKED = {"quantization": {"group_size": 32, "bits": 4, "mode": "affine"}}
STORED = {"kimi_k2": KIMI | PACKED, "kimi_k2, floats": KIMI, "llama": BIASED | PACKED}


@pytest.fixture(scope="module", params=STORED)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_mlx_model(tmp_path_factory.mktemp("joined") / "model", STORED[request.param])


def _load(assignment: Any) -> LoadedPart:
    group = StandInGroup(assignment.rank, assignment.size)
    return load_part(assignment, group, lambda *_: None)


def _by_name(part: LoadedPart) -> dict[str, HeldTensor]:
    assert len({tensor.name for tensor in part.held}) == len(part.held)
    return {tensor.name: tensor for tensor in part.held}


def _bytes(array: mx.array) -> bytes:
    return bytes(memoryview(mx.contiguous(array).reshape(-1).view(mx.uint8)))


# With jobs of a few bytes every parameter is read by ranges, in several jobs.
@pytest.mark.parametrize("job_bytes", [1 << 24, 4096])
@pytest.mark.parametrize(("strategy", "size"), [("single", 1), ("pipeline", 2), ("tensor", 2)])
def test_parts_are_those_of_the_single_projections(
    checkpoint: Path,
    strategy: str,
    size: int,
    job_bytes: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tensor_reader, "_JOB_BYTES", job_bytes)
    held = []
    ways = [
        assignments(checkpoint, strategy, size, dtype="checkpoint", joins_projections=joins)
        for joins in (True, False)
    ]
    for assignment, apart in zip(*ways, strict=True):
        part, expected = _load(assignment), _load(apart)
        assert _by_name(part) == _by_name(expected)
        # Slices of experts are read one by one, without the gaps between their rows.
        assert part.bytes_over_read <= expected.bytes_over_read
        assert part.bytes_read - part.bytes_over_read == part.weights_bytes
        assert part.weights_bytes == expected.weights_bytes
        held.append({tensor.name: tuple(tensor.shape) for tensor in part.held})
        joined = join_projections(expected.stage.model)
        assert joined
        loaded = parameters(part.stage.model)
        for name, value in parameters(expected.stage.model).items():
            assert loaded[name].dtype == value.dtype, name
            assert _bytes(loaded.pop(name)) == _bytes(value), name
        assert not loaded
    check_coverage(part.whole, placement_of(assignment), held)


WIDE = LLAMA | {"hidden_size": 512, "intermediate_size": 12_288, "num_hidden_layers": 2}


def test_loading_holds_no_second_form(tmp_path: Path) -> None:
    """Gate and up have 25 MB each; nothing but the head is evaluated by mlx."""
    config = WIDE | {"torch_dtype": "float32"}
    (assignment,) = assignments(
        random_mlx_model(tmp_path / "model", config),
        "single",
        1,
        dtype="checkpoint",
        joins_projections=True,
    )
    gc.collect()
    mx.clear_cache()
    before = held_bytes()
    mx.reset_peak_memory()
    part = _load(assignment)
    more = mx.get_peak_memory() - before - part.weights_bytes
    assert any(".both." in name for name in parameters(part.stage.model))
    assert more < 4_000_000


def test_large_computed_projections_are_not_joined(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cast or stacked parameter would exist in two forms."""
    monkeypatch.setattr(loader, "MOST_COMPUTED_BYTES", 1000)
    (assignment,) = assignments(checkpoint, "single", 1, joins_projections=True)
    part = _load(assignment)
    assert not any(".both." in name for name in parameters(part.stage.model))


@pytest.mark.ranks
def test_two_ranks_give_the_tokens_of_one(toy_k2: Path, tmp_path: Path) -> None:
    found = []
    for strategy, size, joins in (("single", 1, False), ("tensor", 2, True), ("pipeline", 2, True)):
        parts = assignments(toy_k2, strategy, size, joins_projections=joins)
        with running(RankPool(parts, tmp_path)) as pool:
            found.append(pool.generate(TOKENS[:50], 24))
    assert len(set(found[0])) > 5
    assert found[1] == found[2] == found[0]
