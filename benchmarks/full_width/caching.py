"""Prefill on one GPU with different limits on the freed arrays that MLX keeps.

    python -m benchmarks.full_width.caching all MODEL CONTEXT PROMPT...

``small``: the plan's overhead, as k2 had it; ``plan``: the plan's activations too, within the
plan's memory; ``unlimited``: MLX's own limit, as mlx-lm runs. All in one process, in turn, three
times.
Prints tokens per second and the most memory in use and kept.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
from pathlib import Path

import mlx.core as mx

from benchmarks.gpu_layers import K2, loaded
from k2cli.launch.specification import cache_limit_bytes, memory_limit_bytes
from k2cli.planning.hardware.machine import this_machine
from k2cli.planning.planner import Planner
from k2cli.planning.request import PlanRequest
from k2cli.sharding.stage import cut_stage
from k2cli.sharding.trace import layer_count

ROUNDS = 3


def main() -> None:
    """Measure as the command line says."""
    model_path, context_length = Path(sys.argv[2]), int(sys.argv[3])
    prompts = [int(word) for word in sys.argv[4:]]
    request = PlanRequest(context_length=context_length)
    plan = Planner(str(model_path)).plan([this_machine()], request, limits=False)
    (budget,) = plan.nodes
    unlimited_cache, unlimited = mx.set_cache_limit(0), mx.set_memory_limit(2**40)
    limits = {
        "small": (budget.overhead_bytes, unlimited),
        "plan": (cache_limit_bytes(budget), memory_limit_bytes(budget) or unlimited),
        "unlimited": (unlimited_cache, unlimited),
    }
    model, _ = loaded(model_path, "checkpoint")
    mx.eval(model.parameters())
    stage = cut_stage(model, 0, layer_count(model))
    engine = K2(stage, plan.request.prefill_chunk_tokens, context_length)
    found: dict[str, float] = {"chunk tokens": plan.request.prefill_chunk_tokens}
    rates: dict[str, list[float]] = {}
    seed = 0
    for number in range(-1, ROUNDS):
        for name, (cache, memory) in list(limits.items())[:: -1 if number % 2 else 1]:
            mx.set_cache_limit(cache)
            mx.set_memory_limit(memory)
            mx.clear_cache()
            mx.reset_peak_memory()
            for tokens in prompts:
                seed += 1
                mx.random.seed(seed)
                prompt = [int(word) for word in mx.random.randint(10, 1000, (tokens,)).tolist()]
                first, _, _ = engine.run([prompt], 1)
                if number >= 0:
                    rates.setdefault(f"{name} {tokens}, tok/s", []).append(tokens / first)
            kept = (mx.get_peak_memory() + mx.get_cache_memory()) / 1e9
            found[f"{name}, peak in use and kept at the end, GB"] = round(kept, 2)
    found |= {name: round(statistics.median(values), 1) for name, values in rates.items()}
    found["plan without the program, GB"] = round((memory_limit_bytes(budget) or 0) / 1e9, 2)
    sys.stdout.write(json.dumps(found) + "\n")
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
