"""Products of all of K2's experts on this device: right or wrong, and how long parts of them take.

    python -m benchmarks.full_width.experts [--experts 384] [--outputs 2048] [--inputs 7168]

Makes one matrix of experts with random 4-bit weights (3.2 GB), asks for them as mlx-lm does, and
compares each with the product of its own weights. Then the same with k2's experts in parts, and
the time of both. On an H200 with MLX 0.32.4 every expert from 293 on is wrong without parts.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from k2cli.mlx_lm_package import mlx_lm_module
from k2cli.rank.kernels.experts import part_experts

_GROUP, _BITS, _TOP = 64, 4, 8
_ROUNDS, _PRODUCTS = 5, 20


class Layer(nn.Module):  # type: ignore[misc]
    """One matrix of experts with random weights."""

    def __init__(self, experts: int, outputs: int, inputs: int) -> None:
        super().__init__()
        kind = mlx_lm_module("models.switch_layers").QuantizedSwitchLinear
        self.matrix = kind(_GROUP, _GROUP, 2, False, _GROUP, _BITS)
        # One expert at a time: larger tensors fail in one random call on CUDA.
        words = (1, outputs, inputs * _BITS // 32)
        self.matrix.weight = _joined(
            lambda: mx.random.randint(0, 2**31 - 1, words) * 2 + 1, experts
        )
        self.matrix.weight = self.matrix.weight.astype(mx.uint32)
        groups = (1, outputs, inputs // _GROUP)
        self.matrix.scales = _joined(
            lambda: (mx.random.uniform(0.5, 1.5, groups) / 100).astype(mx.bfloat16), experts
        )
        self.matrix.biases = self.matrix.scales * -7.5
        mx.eval(self.matrix.parameters())


def _joined(draw: Callable[[], mx.array], count: int) -> mx.array:
    value = mx.concatenate([draw() for _ in range(count)])
    mx.eval(value)
    return value


def wrong_experts(matrix: Any, weights: Any, rows: int) -> tuple[int, list[int]]:
    """Return the number of experts that were asked for, and those with a wrong product."""
    experts, _, _ = weights.weight.shape
    inputs = weights.scales.shape[-1] * _GROUP
    indices = mx.sort(mx.random.randint(0, experts, (rows * _TOP,))).astype(mx.uint32)
    values = mx.random.normal((rows * _TOP, 1, inputs)).astype(mx.bfloat16)
    products = matrix(values, indices, sorted_indices=True)
    mx.eval(products)
    chosen: list[int] = indices.tolist()  # type: ignore[assignment]
    wrong = []
    for expert in sorted(set(chosen)):
        row = chosen.index(expert)
        alone = mx.quantized_matmul(
            values[row],
            weights.weight[expert],
            weights.scales[expert],
            weights.biases[expert],
            transpose=True,
            group_size=_GROUP,
            bits=_BITS,
        ).astype(mx.float32)
        error: Any = (mx.abs(products[row] - alone).max() / mx.abs(alone).max()).item()
        if error > 0.05:
            wrong.append(expert)
    return len(set(chosen)), wrong


def _milliseconds(matrix: Any, experts: int, inputs: int, rows: int) -> float:
    indices = mx.sort(mx.random.randint(0, experts, (rows * _TOP,))).astype(mx.uint32)
    values = mx.random.normal((rows * _TOP, 1, inputs)).astype(mx.bfloat16)
    mx.eval(values, indices, matrix(values, indices, sorted_indices=True))
    times = []
    for _ in range(_ROUNDS):
        began = time.perf_counter()
        for _ in range(_PRODUCTS):
            mx.eval(matrix(values, indices, sorted_indices=True))
        times.append((time.perf_counter() - began) / _PRODUCTS * 1000)
    return statistics.median(times)


def main(arguments: list[str] | None = None) -> int:
    """Compare and time; return 1 if a product in parts is wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--experts", type=int, default=384)
    parser.add_argument("--outputs", type=int, default=2048)
    parser.add_argument("--inputs", type=int, default=7168)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 512])
    options = parser.parse_args(arguments)
    failed = False
    for outputs, inputs in (
        (options.outputs, options.inputs),
        (options.inputs, options.outputs),
    ):
        layer = Layer(options.experts, outputs, inputs)
        weights, whole = layer.matrix, layer.matrix
        parted = Layer.__new__(Layer)
        nn.Module.__init__(parted)
        parted.matrix = whole
        part_experts(parted)
        for name, matrix in (("whole", whole), ("parts", parted.matrix)):
            asked, wrong = wrong_experts(matrix, weights, max(options.rows))
            failed = failed or (name == "parts" and bool(wrong))
            places = f", {wrong[0]} to {wrong[-1]}" if wrong else ""
            times = {
                rows: round(_milliseconds(matrix, options.experts, inputs, rows), 3)
                for rows in options.rows
            }
            sys.stdout.write(
                f"{outputs} by {inputs} {name}: {len(wrong)} of {asked} experts wrong{places}; "
                f"milliseconds by rows {times}\n"
            )
            sys.stdout.flush()
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
