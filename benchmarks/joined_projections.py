"""Joined gate and up projections against single ones: time of a step, in this process.

    python -m benchmarks.joined_projections               # toy of K2, large toy, a Llama (CPU)
    python -m benchmarks.joined_projections --full-width  # four layers of K2 on a GPU

Two models with the same weights take turns (A B B A ...) over the same steps, so that only ratios
count: wall time, and time of this process's threads, which other programs disturb less. Prints one
JSON document: medians of the ratios of rounds, and if all logits were equal.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from benchmarks.checkpoints import LARGE_TOY, SMALL_TOY
from benchmarks.gpu_layers import random_layers
from benchmarks.mla_attention import K2_LAYER
from k2cli.rank.joined_projections import join_projections
from k2cli.rank.kernels.device import avoid_wrong_kernels
from k2cli.sharding.assemble import cast
from k2cli.sharding.stage import make_cache
from k2cli.sharding.trace import parameters
from lab.toy_k2.checkpoint import toy_config

LLAMA: dict[str, Any] = {
    "model_type": "llama", "hidden_size": 1024, "num_hidden_layers": 4, "intermediate_size": 2816,
    "num_attention_heads": 16, "num_key_value_heads": 4, "vocab_size": 1024, "rms_norm_eps": 1e-5,
    "max_position_embeddings": 4096, "tie_word_embeddings": False,
    "quantization": {"group_size": 64, "bits": 4, "mode": "affine"},
}  # fmt: skip
CONTEXT = 8


def _model(config: dict[str, Any], dtype: mx.Dtype, *, joined: bool) -> nn.Module:
    model = random_layers(config, config["num_hidden_layers"])
    cast(model, dtype)
    if joined:
        join_projections(model)
    # One by one, so that no more than one matrix exists in two forms.
    for value in parameters(model).values():
        mx.eval(value)
    avoid_wrong_kernels(model)
    return model


def _steps(
    model: nn.Module, rows: int, tokens: int, steps: int
) -> tuple[float, float, list[mx.array]]:
    """Return seconds of a step, of the clock and of the processor, and the logits."""
    cache = make_cache(model)
    prompt = mx.array([[(7 + index * 31) % 300 for index in range(CONTEXT)]] * rows)
    chunk = mx.array([[(5 + index * 7) % 300 for index in range(tokens)]] * rows)
    mx.eval(model(prompt, cache=cache))
    mx.synchronize()
    started, used = time.perf_counter(), time.process_time()
    found = []
    for _ in range(steps):
        found.append(model(chunk, cache=cache)[:, -1])
        mx.eval(found[-1])
    mx.synchronize()
    return (time.perf_counter() - started) / steps, (time.process_time() - used) / steps, found


def compare(
    config: dict[str, Any], dtype: mx.Dtype, cases: list[tuple[int, int, int]], rounds: int
) -> list[dict[str, Any]]:
    """Measure each case of (rows, tokens per row, steps)."""
    models = {joined: _model(config, dtype, joined=joined) for joined in (False, True)}
    results = []
    for rows, tokens, steps in cases:
        samples: dict[bool, list[tuple[float, float, list[mx.array]]]] = {False: [], True: []}
        for index in range(rounds + 1):
            for joined in (False, True) if index % 2 else (True, False):
                sample = _steps(models[joined], rows, tokens, steps)
                if index:  # the first round compiles kernels
                    samples[joined].append(sample)
        pairs = list(zip(samples[True], samples[False], strict=True))
        equal = [
            mx.array_equal(a, b).item() for x, y in pairs for a, b in zip(x[2], y[2], strict=True)
        ]
        results.append(
            {
                "rows": rows,
                "tokens": tokens,
                "ratio": round(statistics.median(a[0] / b[0] for a, b in pairs), 3),
                "processor_ratio": round(statistics.median(a[1] / b[1] for a, b in pairs), 3),
                "single_milliseconds": round(1e3 * statistics.median(b[0] for _, b in pairs), 3),
                "joined_milliseconds": round(1e3 * statistics.median(a[0] for a, _ in pairs), 3),
                "rounds": rounds,
                "equal": all(equal),
            }
        )
        sys.stderr.write(f"{json.dumps(results[-1])}\n")
    return results


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--full-width", action="store_true", help="four layers of K2, bfloat16")
    parser.add_argument("--rounds", type=int, default=9)
    given = parser.parse_args()
    if given.full_width:
        config = K2_LAYER | {"num_hidden_layers": 4, "first_k_dense_replace": 1}
        cases = [(1, 1, 60), (8, 1, 30), (1, 512, 3)]
        document = {"K2": compare(config, mx.bfloat16, cases, given.rounds)}
    else:
        configs = {
            "toy": toy_config(SMALL_TOY), "large toy": toy_config(LARGE_TOY), "llama": LLAMA,
        }  # fmt: skip
        cases = [(1, 1, 12), (8, 1, 4), (1, 64, 1)]
        document = {
            name: compare(config, mx.float32, cases, given.rounds)
            for name, config in configs.items()
        }
    json.dump(document, sys.stdout, indent=1)
    sys.stdout.write("\n")


if __name__ == "__main__":
    main()
