"""The text of k2's own CUDA kernels against plain operations (``tests.support.own_kernels``).

Without a GPU it runs on this processor (``tests.support.cuda_on_cpu``), in smaller shapes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import mlx.core as mx
import pytest

from k2cli.rank.kernels import chosen_product, expert_choice, shared_product
from k2cli.rank.kernels.few_inputs import with_zeros
from tests.support import cuda_on_cpu
from tests.support import own_kernels as plain

HAS_GPU = mx.cuda.is_available() and mx.default_device() != mx.cpu
MATRICES = 6
# One step between neighbouring values, and what the order of additions changes in float32.
BOUNDS = {mx.bfloat16: 0.008, mx.float16: 0.001, mx.float32: 1e-5}
CHOSEN_SHAPES: list[tuple[mx.Dtype, int, tuple[int, ...], int, int]] = [
    # type, inputs, outputs of each part, bits, group size
    (mx.bfloat16, 320, (32, 64), 4, 64), (mx.float16, 512, (64,), 4, 128),
    (mx.float32, 1024, (16,), 8, 32), (mx.bfloat16, 2048, (16,), 2, 64),
    # So few inputs that a lane writes several outputs, and a block more than it has threads.
    (mx.float16, 128, (96,), 4, 64), (mx.bfloat16, 64, (128,), 4, 32),
    (mx.float32, 32, (256,), 4, 32), (mx.float16, 192, (64,), 2, 64),
]  # fmt: skip
SHARED_SHAPES = [(64, 1), (640, 65)]
if HAS_GPU:
    for kind in BOUNDS:
        CHOSEN_SHAPES += [(kind, 7168, (128, 128), 4, 64), (kind, 2048, (256,), 4, 64)]
    SHARED_SHAPES += [(7168, 576), (1024, 4096)]


@pytest.fixture(autouse=True)
def kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let the kernels run on a GPU or, without one, on this processor."""
    if HAS_GPU:
        yield
        return
    if not cuda_on_cpu.PRESENT:
        pytest.skip("needs an NVIDIA GPU, or g++ on Linux")
    monkeypatch.setattr(mx.fast, "cuda_kernel", cuda_on_cpu.cuda_kernel)
    made = [module._kernel for module in (chosen_product, shared_product, expert_choice)]
    for each in made:
        each.cache_clear()
    yield
    for each in made:
        each.cache_clear()


def _error(found: mx.array, wanted: mx.array) -> float:
    """Return the largest difference relative to the largest wanted value."""
    found, wanted = found.astype(mx.float32), wanted.astype(mx.float32)
    error: Any = (mx.abs(found - wanted).max() / mx.abs(wanted).max()).item()
    return float(error)


def _parts(
    widths: tuple[int, ...], inputs: int, bits: int, group_size: int, dtype: mx.Dtype
) -> list[dict[str, mx.array]]:
    parts = []
    for width in widths:
        weight = mx.random.normal((MATRICES, width, inputs)) * 0.1
        arrays = mx.quantize(weight.astype(dtype), group_size=group_size, bits=bits)
        parts.append(dict(zip(("weight", "scales", "biases"), arrays, strict=True)))
    mx.eval(parts)
    return parts


@pytest.mark.parametrize(("dtype", "inputs", "widths", "bits", "group_size"), CHOSEN_SHAPES)
def test_products_with_chosen_matrices(
    dtype: mx.Dtype, inputs: int, widths: tuple[int, ...], bits: int, group_size: int
) -> None:
    mx.random.seed(1)
    settings = {"group_size": group_size, "bits": bits, "mode": "affine"}
    parts = _parts(widths, inputs, bits, group_size, dtype)
    # Matrices with more inputs than count, as heads have.
    parts = [with_zeros(part, group_size, group_size=group_size, bits=bits) for part in parts]
    mx.eval(parts)
    rows, choices = 3, 2
    chosen = mx.random.randint(0, MATRICES, (rows, 4)).astype(mx.uint32)[:, 1 : 1 + choices]
    factors = mx.random.uniform(shape=(choices, rows)).T
    # One value more: rows that no load of 16 bytes may read.
    wide = mx.random.normal((rows * choices, inputs + 1)).astype(dtype)
    apart, together = wide[:rows, 1:], mx.contiguous(wide[:, :-1])
    assert chosen_product.is_known(parts, settings, inputs)
    asked: list[tuple[mx.array, dict[str, Any]]] = [(apart, {}), (together, {"factors": factors})]
    if chosen_product.is_known(parts, settings, inputs, gated=True):
        asked.append((together[::choices], {"gated": True}))
    for x, options in asked:
        found = chosen_product.chosen_product(x, chosen, parts, settings, **options)
        wanted = plain.chosen_product(x, chosen, parts, settings, **options)
        assert found.shape == wanted.shape
        assert _error(found, wanted) <= BOUNDS[dtype], options.keys()


@pytest.mark.parametrize("dtype", shared_product.DTYPES)
@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize(("inputs", "outputs"), SHARED_SHAPES)
def test_products_with_a_shared_matrix(
    inputs: int, outputs: int, group_size: int, dtype: mx.Dtype
) -> None:
    if inputs % group_size:
        inputs += group_size - inputs % group_size
    mx.random.seed(2)
    (part,) = _parts((outputs,), inputs, 4, group_size, dtype)
    arrays = {name: value[0] for name, value in part.items()}
    assert shared_product.is_known(arrays, {"group_size": group_size, "bits": 4, "mode": "affine"})
    for rows in (1, 8, 9):
        values = mx.random.normal((rows * inputs + 3,)).astype(dtype)
        for first in (0, 3):  # where loads of 16 bytes may read, and where not
            x = values[first : first + rows * inputs].reshape(rows, inputs)
            found = shared_product.shared_product(x, arrays, group_size)
            wanted = plain.shared_product(x, arrays, group_size)
            assert _error(found, wanted) <= BOUNDS[dtype], (rows, first)


@pytest.mark.parametrize("experts", [8, 72, 384])
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
