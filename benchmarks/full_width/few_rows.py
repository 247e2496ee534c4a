"""k2's CUDA kernel for few rows against MLX's products, at K2's full width, on one GPU.

    python -m benchmarks.full_width.few_rows [--rows 1 2 4 8 16 32 64]

Makes one layer of K2's experts with random 4-bit weights (9.5 GB) and one layer's projections of
heads. Prints the error of each form relative to the largest result, against float32, and
milliseconds of a layer: of mlx-lm's experts as they are (wrong from expert 293 on), of experts in
parts, and of the kernel.
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from benchmarks.full_width.experts import Layer
from k2cli.mlx_lm_package import mlx_lm_module
from k2cli.rank.kernels import gated_experts, heads, linears
from k2cli.rank.kernels.experts import part_experts
from k2cli.rank.kernels.shared_product import MOST_ROWS

_EXPERTS, _WIDTH, _HIDDEN, _TOP = 384, 7168, 2048, 8
_HEADS, _LATENT, _NOPE, _ROPE = 64, 512, 128, 64
_PRODUCTS = 20
_MOST_OUTPUTS = 2**25
"""Results of one product, at most: logits of more rows are never wanted."""

Form = Callable[[mx.array, mx.array], mx.array]


def _products(rows: int) -> int:
    """Return how many products are measured at once."""
    return _PRODUCTS if rows <= 128 else 4


def make_experts() -> Any:
    """Make a layer of experts, as mlx-lm has it, with random weights."""
    kinds = mlx_lm_module("models.switch_layers")
    layer = kinds.SwitchGLU(64, 64, 2)
    layer.gate_proj = Layer(_EXPERTS, _HIDDEN, _WIDTH).matrix
    layer.up_proj = Layer(_EXPERTS, _HIDDEN, _WIDTH).matrix
    layer.down_proj = Layer(_EXPERTS, _WIDTH, _HIDDEN).matrix
    return layer


def alone(layer: Any, x: mx.array, chosen: Sequence[int]) -> mx.array:
    """Compute the experts of one row ``[width]`` from their dequantized weights, in float32."""

    def weight(matrix: Any, expert: int) -> mx.array:
        return mx.dequantize(
            matrix.weight[expert],
            matrix.scales[expert],
            matrix.biases[expert],
            group_size=matrix.group_size,
            bits=matrix.bits,
        ).astype(mx.float32)

    x = x.astype(mx.float32)
    products = []
    for expert in chosen:
        hidden = nn.silu(weight(layer.gate_proj, expert) @ x) * (weight(layer.up_proj, expert) @ x)
        products.append(weight(layer.down_proj, expert) @ hidden)
    return mx.stack(products)


def _error(found: mx.array, wanted: mx.array) -> float:
    difference: Any = mx.abs(found.astype(mx.float32) - wanted).max() / mx.abs(wanted).max()
    return round(float(difference.item()), 5)


def milliseconds(forms: dict[str, Form], inputs: list[tuple[mx.array, ...]], rounds: int) -> Any:
    """Measure forms in turn; return the medians of each, per product."""
    times: dict[str, list[float]] = {name: [] for name in forms}
    for form in forms.values():
        mx.eval([form(*each) for each in inputs])
    for _ in range(rounds):
        for name, form in forms.items():
            began = time.perf_counter()
            mx.eval([form(*each) for each in inputs])
            times[name].append((time.perf_counter() - began) / len(inputs) * 1000)
    return {name: round(statistics.median(each), 4) for name, each in times.items()}


def _inputs(rows: int) -> list[tuple[mx.array, ...]]:
    """Draw rows and the experts of each, which differ as a router's do."""
    result = []
    for _ in range(_products(rows)):
        x = mx.random.normal((rows, 1, _WIDTH)).astype(mx.bfloat16) * 0.1
        order = mx.argsort(mx.random.uniform(shape=(rows, 1, _EXPERTS)), axis=-1)
        result.append((x, order[..., :_TOP].astype(mx.uint32)))
    mx.eval(result)
    return result


def measure_experts(rows_list: Sequence[int], rounds: int) -> list[dict[str, Any]]:
    """Compare a layer's experts in all forms."""
    whole = make_experts()
    kinds = mlx_lm_module("models.switch_layers")

    def with_matrices_of(other: Any) -> Any:
        layer = kinds.SwitchGLU(64, 64, 2)
        layer.gate_proj, layer.up_proj = other.gate_proj, other.up_proj
        layer.down_proj = other.down_proj
        return layer

    parts = with_matrices_of(whole)
    part_experts(parts)
    own = with_matrices_of(parts)
    if gated_experts.use_own_experts(own) != 1:
        raise SystemExit("the kernel does not know these experts")
    results = []
    for rows in rows_list:
        inputs = _inputs(rows)
        x, indices = inputs[0]
        chosen: list[int] = indices[-1, 0].tolist()  # type: ignore[assignment]
        wanted = alone(whole, x[-1, 0], chosen)
        forms: dict[str, Form] = {"mlx-lm": whole, "parts": parts, "kernel": own}
        errors = {name: _error(form(x, indices)[-1, 0], wanted) for name, form in forms.items()}
        entry = {"rows": rows, "error": errors, "ms": milliseconds(forms, inputs, rounds)}
        results.append(entry)
        sys.stderr.write(json.dumps(entry) + "\n")
    return results


def _compared(
    about: dict[str, Any],
    forms: dict[str, Any],
    drawn: list[tuple[mx.array, ...]],
    wanted: mx.array,
    rounds: int,
) -> dict[str, Any]:
    """Add errors of forms with the first of the inputs, and times with all; print them."""
    errors = {name: _error(form(*drawn[0]), wanted) for name, form in forms.items()}
    found = about | {"error": errors, "ms": milliseconds(forms, drawn, rounds)}
    sys.stderr.write(json.dumps(found) + "\n")
    return found


def measure_heads(rows_list: Sequence[int], rounds: int) -> list[dict[str, Any]]:
    """Compare the projections of heads: queries to latents, and latents to values."""
    kind = mlx_lm_module("models.mla").QuantizedMultiLinear
    results = []
    for inputs, outputs, held in ((_NOPE, _LATENT, _NOPE + _ROPE), (_LATENT, _NOPE, _LATENT)):
        plain = kind(inputs, outputs, _HEADS, 64, 4, "affine")
        own = heads.HeadProjection(plain)
        padded = heads.HeadProjection(plain)
        padded.knows_few_rows = False
        weights = heads.dequantized(plain).astype(mx.float32)
        for rows in rows_list:
            if rows > 128:
                continue
            shape = (rows, 1, _HEADS, held)
            drawn = [
                (mx.random.normal(shape).astype(mx.bfloat16).swapaxes(1, 2)[..., :inputs],)
                for _ in range(_products(rows))
            ]
            mx.eval(drawn)
            forms: dict[str, Any] = {"mlx-lm": plain, "zeros": padded, "kernel": own}
            wanted = drawn[0][0].astype(mx.float32) @ weights.swapaxes(-1, -2)
            about = {"inputs": inputs, "outputs": outputs, "rows": rows}
            results.append(_compared(about, forms, drawn, wanted, rounds))
    return results


def _as_matrix(layer: Any, x: mx.array) -> mx.array:
    """Multiply ``[rows, 1, inputs]`` as the rows of one matrix, which they are in a prompt."""
    product: mx.array = layer(x.swapaxes(0, 1)).swapaxes(0, 1)
    return product


def measure_linears(rows_list: Sequence[int], rounds: int) -> list[dict[str, Any]]:
    """Compare linear layers: the output of attention, a small one, and the head."""
    results = []
    for inputs, outputs in ((8192, 7168), (7168, 576), (1536, 12_288), (7168, 163_840)):
        plain = nn.QuantizedLinear.from_linear(nn.Linear(inputs, outputs, bias=False), 64, 4)
        plain.scales, plain.biases = (
            plain[name].astype(mx.bfloat16) for name in ("scales", "biases")
        )
        mx.eval(plain.parameters())
        own = copy.copy(plain)
        if linears.use_own_linears(own) != 1:
            raise SystemExit("the kernel does not know this layer")
        weight = mx.dequantize(plain.weight, plain.scales, plain.biases, 64, 4).astype(mx.float32)
        for rows in rows_list:
            if rows * outputs > _MOST_OUTPUTS:
                continue
            drawn = [
                (mx.random.normal((rows, 1, inputs)).astype(mx.bfloat16),)
                for _ in range(_products(rows))
            ]
            mx.eval(drawn)
            forms: dict[str, Any] = {"mlx, one matrix": functools.partial(_as_matrix, plain)}
            if rows <= MOST_ROWS:
                forms["kernel"] = own
            if rows <= 128:
                forms["mlx"] = plain
            wanted = drawn[0][0].astype(mx.float32) @ weight.T
            about = {"inputs": inputs, "outputs": outputs, "rows": rows}
            results.append(_compared(about, forms, drawn, wanted, rounds))
    return results


def main(arguments: list[str] | None = None) -> int:
    """Measure and print one JSON document."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64])
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args(arguments)
    # Measured beyond its limits as well, since these are chosen by this.
    heads.MOST_ROWS = 10**6
    results = {
        "device": str(mx.device_info()),
        "linears": measure_linears(options.rows, options.rounds),
        "heads": measure_heads(options.rows, options.rounds),
        "experts": measure_experts(options.rows, options.rounds),
    }
    json.dump(results, sys.stdout, indent=1)
    sys.stdout.write("\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
