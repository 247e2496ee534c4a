"""k2's own latent attention against mlx-lm's class: time, peak memory and difference.

    python -m benchmarks.mla_attention          # one full-width layer of K2 on a GPU, else a toy
    python -m benchmarks.mla_attention --toy    # the toy of K2 on this device
    python -m benchmarks.mla_attention --prompt # the toy's whole prompt, a quarter of an hour

Both ways run in this process on the same arrays, in turn (A B B A ...), so that only their ratios
count. *Follow-ups* compute a few tokens after a long context, *chunks* the last 2,048 tokens of a
prompt, *prompts* all of its chunks through k2's executor. A peak is ``mx.get_peak_memory`` beside
what is held before. Prints one JSON document; under 3 minutes on a GPU.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from benchmarks.gpu_layers import random_layers
from k2cli.mlx_lm_package import mlx_lm_module
from k2cli.planning.memory.prefill import activation_shape, prefill_activation
from k2cli.protocol import OpenSequence, Prefill
from k2cli.rank.attention.latent import use_own_attention
from k2cli.rank.executor import Executor
from k2cli.rank.kernels.device import avoid_wrong_kernels
from k2cli.sharding.assemble import cast
from k2cli.sharding.latent_ways import EXPANSION_WEIGHTS, LatentSettings
from k2cli.sharding.stage import cut_stage
from lab.toy_k2.checkpoint import ToyShape, toy_config

K2_LAYER: dict[str, Any] = {
    "model_type": "kimi_k2", "hidden_size": 7168, "num_attention_heads": 64,
    "num_key_value_heads": 64, "vocab_size": 1024, "intermediate_size": 18432,
    "moe_intermediate_size": 2048, "n_routed_experts": 384, "n_shared_experts": 1,
    "num_experts_per_tok": 8, "num_hidden_layers": 1, "first_k_dense_replace": 0,
    "kv_lora_rank": 512, "q_lora_rank": 1536, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64,
    "v_head_dim": 128, "routed_scaling_factor": 2.827, "topk_method": "noaux_tc",
    "scoring_func": "sigmoid", "norm_topk_prob": True, "n_group": 1, "topk_group": 1,
    "moe_layer_freq": 1, "max_position_embeddings": 131072, "rms_norm_eps": 1e-6,
    "rope_theta": 50000.0, "attention_bias": False, "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "rope_scaling": {"beta_fast": 1.0, "beta_slow": 1.0, "factor": 32.0, "mscale": 1.0,
                     "mscale_all_dim": 1.0, "original_max_position_embeddings": 4096,
                     "type": "yarn"},
    "quantization": {"group_size": 64, "bits": 4, "mode": "affine"},
}  # fmt: skip
"""One layer of Kimi K2 with experts, in MLX's 4 bit."""

MLX_LM = LatentSettings(0.0)
"""Settings with which every step is mlx-lm's own."""

CHUNK_TOKENS = 2048
TOY_CONTEXT = 16_384
_MOST_COMPARED = 160
"""Queries whose outputs are compared: float32 of more needs too much memory."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One run: its time, and its peak beside what was held before."""

    seconds: float
    peak_bytes: int


Run = Callable[[LatentSettings], Sample]


def compare(run: Run, ours: LatentSettings, rounds: int, *, warm_up: bool = True) -> dict[str, Any]:
    """Run both ways in turn; return the medians of the ratios of rounds, and all samples.

    With ``warm_up`` there is one more round, which compiles kernels and is left out.
    """
    ways = {"k2": ours, "mlx_lm": MLX_LM}
    samples: dict[str, list[Sample]] = {name: [] for name in ways}
    for index in range(0 if warm_up else 1, rounds + 1):
        for name in list(ways) if index % 2 == 0 else reversed(list(ways)):
            sample = run(ways[name])
            if index:
                samples[name].append(sample)
    pairs = list(zip(samples["k2"], samples["mlx_lm"], strict=True))
    return {
        "time_ratio": statistics.median(own.seconds / other.seconds for own, other in pairs),
        "peak_ratio": statistics.median(own.peak_bytes / other.peak_bytes for own, other in pairs),
        **{
            f"{name}_milliseconds": [round(1000 * each.seconds, 3) for each in found]
            for name, found in samples.items()
        },
        **{
            f"{name}_peak_mb": round(max(each.peak_bytes for each in found) / 1e6, 1)
            for name, found in samples.items()
        },
    }


def _measured(compute: Callable[[], Any]) -> Sample:
    gc.collect()
    mx.synchronize()
    mx.clear_cache()
    held = mx.get_active_memory()
    mx.reset_peak_memory()
    started = time.perf_counter()
    result = compute()
    mx.eval(result)
    mx.synchronize()
    seconds = time.perf_counter() - started
    return Sample(seconds, mx.get_peak_memory() - held)


class Layer:
    """One layer with a cache of random latents.

    Args:
        model: a model with at least one layer; the last one is measured.
        context: tokens in the cache before a step.
        most_queries: tokens of the largest step.
    """

    def __init__(self, model: nn.Module, context: int, most_queries: int) -> None:
        self._layer: Any = model.layers[-1]
        self._model = model
        attention = self._layer.self_attn
        width = attention.kv_lora_rank, attention.qk_rope_head_dim
        self._dtype = self._layer.input_layernorm.weight.dtype
        self._cache = mlx_lm_module("models.cache").KVCache()
        self._cache.keys, self._cache.values = (
            mx.random.normal((1, 1, context + most_queries, each)).astype(self._dtype)
            for each in width
        )
        self._cache.offset = context
        self._hidden = mx.random.normal((1, most_queries, attention.hidden_size))
        self._hidden = self._hidden.astype(self._dtype)
        mx.eval(self._cache.keys, self._cache.values, self._hidden)

    def output(
        self, settings: LatentSettings, queries: int, *, attention: bool = False
    ) -> mx.array:
        """Compute a step after the context, lazily: of the layer, or of its attention alone."""
        use_own_attention(self._model, settings)
        hidden = self._hidden[:, :queries]
        mask = self._cache.make_mask(queries, return_array=True, window_size=None)
        part = self._layer.self_attn if attention else self._layer
        result: mx.array = part(hidden, mask, self._cache)
        self._cache.trim(queries)
        return result

    def runs(self, queries: int, *, attention: bool = False) -> Run:
        return lambda settings: _measured(
            lambda: self.output(settings, queries, attention=attention)
        )

    def errors(self, settings: LatentSettings, queries: int) -> dict[str, float]:
        """Return the largest errors of attention's outputs, relative to the largest output.

        They are those of both ways against mlx-lm's way in float32, and their difference.
        """
        queries = min(queries, _MOST_COMPARED)
        own, other = (
            self.output(each, queries, attention=True).astype(mx.float32)
            for each in (settings, MLX_LM)
        )
        mx.eval(own, other)
        exact = self._in_float32(queries)
        largest = mx.abs(exact).max()

        def error(left: mx.array, right: mx.array) -> float:
            value: Any = (mx.abs(left - right).max() / largest).item()
            return float(value)

        return {
            "error_of_k2": error(own, exact),
            "error_of_mlx_lm": error(other, exact),
            "difference": error(own, other),
        }

    def _in_float32(self, queries: int) -> mx.array:
        """Compute attention mlx-lm's way in float32; weights, cache and input are put back."""
        attention, cache, hidden = self._layer.self_attn, self._cache, self._hidden
        weights = attention.parameters()
        keys, values = cache.keys, cache.values
        try:
            cast(attention, mx.float32)
            cache.keys, cache.values = keys.astype(mx.float32), values.astype(mx.float32)
            self._hidden = hidden.astype(mx.float32)
            result = self.output(MLX_LM, queries, attention=True)
            mx.eval(result)
        finally:
            attention.update(weights)
            cache.keys, cache.values, self._hidden = keys, values, hidden
        return result


def layer_figures(
    model: nn.Module,
    contexts: Sequence[int],
    queries: Sequence[int],
    blocks: Sequence[int],
    weight: float,
    rounds: int,
) -> list[dict[str, Any]]:
    """Measure one layer: follow-ups, and a chunk of a prompt in blocks."""
    found: list[dict[str, Any]] = []
    for context in contexts:
        cases = [("follow-up", count, LatentSettings(weight)) for count in queries]
        cases += [("chunk", CHUNK_TOKENS, LatentSettings(weight, block)) for block in blocks]
        for name, count, settings in cases:
            layer = Layer(model, context, count)
            for attention in (False, True):
                case = {
                    "case": name,
                    "part": "attention" if attention else "layer",
                    "context": context,
                    "queries": count,
                    "block_tokens": settings.block_tokens,
                    **compare(layer.runs(count, attention=attention), settings, rounds),
                    **_planned(settings, context, count),
                    "errors": layer.errors(settings, count),
                }
                found.append(case)
                _note(case)
    return found


def _planned(settings: LatentSettings, context: int, queries: int) -> dict[str, float]:
    """Return the planner's peaks of a layer's step on CUDA, whose chunk may be no larger."""
    shape = replace(activation_shape(K2_LAYER), own_attention=True)
    found = {}
    for name, way in (("k2", settings), ("mlx_lm", None)):
        planned = prefill_activation(
            shape, device="cuda", chunk_tokens=queries, context_length=context + queries,
            concurrency=1, itemsize=2, samples=False, settings=way,
        )  # fmt: skip
        found[f"{name}_planned_mb"] = round(planned.peak_bytes / 1e6, 1)
    return found


def toy_model() -> nn.Module:
    """Make the toy of K2 with a dense layer and one with experts, in 4 bit and float32."""
    model = random_layers(toy_config(ToyShape(layers=2)), 2)
    cast(model, mx.float32)
    mx.eval(model.parameters())
    return model


def toy_figures(rounds: int, weight: float, blocks: Sequence[int]) -> list[dict[str, Any]]:
    """Measure a layer of the toy: a follow-up of 32 tokens, and the last chunk of a prompt."""
    model = toy_model()
    before = TOY_CONTEXT - CHUNK_TOKENS
    cases = [("follow-up", TOY_CONTEXT, 32, LatentSettings(weight), 3 * rounds)]
    cases += [
        ("chunk", before, CHUNK_TOKENS, LatentSettings(weight, block), rounds) for block in blocks
    ]
    found: list[dict[str, Any]] = []
    for name, context, count, settings, repeated in cases:
        layer = Layer(model, context, count)
        case = {
            "case": name,
            "part": "layer",
            "context": context,
            "queries": count,
            "block_tokens": settings.block_tokens,
            **compare(layer.runs(count), settings, repeated),
            "errors": layer.errors(settings, count),
        }
        found.append(case)
        _note(case)
    return found


def prompt_figures(weight: float, blocks: Sequence[int]) -> list[dict[str, Any]]:
    """Measure all chunks of a prompt of the toy through k2's executor, once each way."""
    model = toy_model()
    numbers = iter(range(1, 1_000_000))

    def prompt(settings: LatentSettings) -> Sample:
        use_own_attention(model, settings)
        executor = Executor(cut_stage(model, 0, 2), None)

        def compute() -> list[Any]:
            executor.carry_out(OpenSequence(next(numbers), 1))
            for first in range(0, TOY_CONTEXT, CHUNK_TOKENS):
                tokens = [7 + (first + index) * 31 % 500 for index in range(CHUNK_TOKENS)]
                executor.carry_out(Prefill(next(numbers), 1, tokens))
            return [cache.state for cache in executor.caches.sequences[1]]

        return _measured(compute)

    found: list[dict[str, Any]] = []
    for block in blocks:
        settings = LatentSettings(weight, block)
        case = {
            "case": "prompt",
            "part": "model",
            "context": TOY_CONTEXT,
            "queries": CHUNK_TOKENS,
            "block_tokens": block,
            **compare(prompt, settings, 1, warm_up=False),
        }
        found.append(case)
        _note(case)
    return found


def _note(case: dict[str, Any]) -> None:
    short = {key: value for key, value in case.items() if not isinstance(value, list)}
    sys.stderr.write(json.dumps(short) + "\n")
    sys.stderr.flush()


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def main() -> None:
    """Read the options, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--toy", action="store_true", help="the toy, also on a GPU")
    parser.add_argument("--prompt", action="store_true", help="a whole prompt of the toy")
    parser.add_argument("--contexts", type=_numbers, default=[16_384, 65_536])
    parser.add_argument("--queries", type=_numbers, default=[16, 50, 160])
    parser.add_argument("--blocks", type=_numbers, default=[1024, 2048], help="tokens of a block")
    parser.add_argument("--rounds", type=int, default=0, help="0: 5 on a GPU, 3 for the toy")
    parser.add_argument("--weight", type=float, help="expansion weight in place of the table's")
    given = parser.parse_args()
    on_gpu = mx.default_device() == mx.gpu
    device = ("cuda" if mx.cuda.is_available() else "metal") if on_gpu else "cpu"
    weight = EXPANSION_WEIGHTS[device] if given.weight is None else given.weight
    started = time.monotonic()
    mx.random.seed(0)
    if given.prompt:
        figures = prompt_figures(weight, given.blocks)
    elif given.toy or not on_gpu:
        figures = toy_figures(given.rounds or 3, weight, given.blocks)
    else:
        model = random_layers(K2_LAYER, 1)
        avoid_wrong_kernels(model)
        mx.eval(model.parameters())
        figures = layer_figures(
            model, given.contexts, given.queries, given.blocks, weight, given.rounds or 5
        )
    document = {
        "device": device,
        "name": str(mx.device_info()) if on_gpu else "cpu",
        "expansion_weight": weight,
        "figures": figures,
        "seconds": round(time.monotonic() - started, 1),
    }
    json.dump(document, sys.stdout, indent=1)
    sys.stdout.write("\n")


if __name__ == "__main__":
    main()
