"""Products of all heads on this device, as mlx-lm asks for them and in k2's form: right or wrong.

    python -m benchmarks.full_width.heads [--heads 64] [--outputs 512] [--inputs 128]

Multiplies random inputs, bfloat16, by one matrix per head with random 4-bit weights, and compares
with the product of the dequantized weights in float32. On an H200 with MLX 0.32.4 mlx-lm's module
is wrong for more than one row. With ``--once k2`` or ``--once mlx-lm`` it computes one row twice
and compares nothing, for ``compute-sanitizer --tool memcheck --padding 4096`` (and
``MLX_USE_CUDA_GRAPHS=0``), which finds what the kernel reads past the matrices.
"""

from __future__ import annotations

import argparse
import json
import sys

import mlx.core as mx
import mlx.nn as nn

from k2cli.mlx_lm_package import mlx_lm_module
from k2cli.rank.kernels.comparison import relative_error
from k2cli.rank.kernels.heads import dequantized, use_own_heads
from k2cli.sharding.assemble import cast

CASES = ((1, 1), (4, 1), (8, 1), (1, 20), (3, 20), (2, 300))
"""Rows, and tokens of each."""
_GROUP, _BITS = 64, 4


class Layer(nn.Module):  # type: ignore[misc]
    """One matrix per head with random weights, in mlx-lm's module or k2's."""

    def __init__(self, heads: int, outputs: int, inputs: int, *, own: bool) -> None:
        super().__init__()
        kind = mlx_lm_module("models.mla").QuantizedMultiLinear
        self.matrices = kind(inputs, outputs, heads, _GROUP, _BITS, "affine")
        cast(self, mx.bfloat16)
        mx.eval(self.parameters())
        if own:
            use_own_heads(self)


def error(
    layer: Layer, shape: tuple[int, int, int], rows: int, tokens: int, *, transpose: bool
) -> float:
    """Return the largest error of a product, relative to its largest value."""
    heads, outputs, inputs = shape
    width = inputs if transpose else outputs
    x = mx.random.normal((rows, heads, tokens, width)).astype(mx.bfloat16)
    weights = dequantized(layer.matrices).astype(mx.float32)
    wanted = x.astype(mx.float32) @ (weights.swapaxes(-1, -2) if transpose else weights)
    return relative_error(layer.matrices(x, transpose=transpose), wanted)


def main() -> None:
    """Print one JSON line per form and case."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name, count in (("heads", 64), ("outputs", 512), ("inputs", 128)):
        parser.add_argument(f"--{name}", type=int, default=count)
    parser.add_argument("--once", choices=("k2", "mlx-lm"))
    given = parser.parse_args()
    shape = given.heads, given.outputs, given.inputs
    if given.once:
        layer = Layer(*shape, own=given.once == "k2")
        x = mx.random.normal((1, given.heads, 1, given.inputs)).astype(mx.bfloat16)
        for _ in range(2):
            mx.eval(layer.matrices(x))
        return
    for form in ("mlx-lm", "k2"):
        mx.random.seed(0)
        layer = Layer(*shape, own=form == "k2")
        for rows, tokens in CASES:
            errors = {
                name: round(error(layer, shape, rows, tokens, transpose=transpose), 4)
                for name, transpose in (("transposed", True), ("not transposed", False))
            }
            case = {"form": form, "rows": rows, "tokens": tokens, **errors}
            sys.stdout.write(json.dumps(case) + "\n")


if __name__ == "__main__":
    main()
