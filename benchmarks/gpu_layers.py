"""k2's engine against mlx-lm on one GPU: some full-width layers of K2, and a whole small model.

    python -m benchmarks.gpu_layers --config CONFIG_JSON --layers 6
    python -m benchmarks.gpu_layers --checkpoint FOLDER
    python -m benchmarks.gpu_layers --full-width --layers 4 --as-held

Both run in this process, on the very same arrays, in turn (A B B A ...), after a warm-up that
compiles every kernel. With ``--as-held`` k2 has a second model with the same weights, as a rank
holds them: projections joined, experts in parts, attention of its own. K2's layers get random
4-bit weights: their values do not matter to speed, except that the router must spread tokens over
the experts, which random weights do. Nothing is drafted. Prints one JSON document: medians and
every sample, in tokens per second.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from k2cli.models.checkpoint import read_checkpoint
from k2cli.protocol import Finished, Generate, RankMessage, Tokens
from k2cli.rank.control import Followers
from k2cli.rank.engine.engine import Engine
from k2cli.rank.executor import Executor
from k2cli.rank.kernels.comparison import relative_error
from k2cli.sharding.assemble import assemble
from k2cli.sharding.stage import Stage, cut_stage, make_cache
from k2cli.sharding.trace import layer_count

PART_ELEMENTS = 2**28


def _random_like(value: mx.array, scale: float) -> mx.array:
    """Make random data in parts: one call may not have more than about 2^31 elements."""
    parts = []
    for first in range(0, value.size, PART_ELEMENTS):
        count = min(PART_ELEMENTS, value.size - first)
        if value.dtype == mx.uint32:
            bits = mx.random.randint(-(2**31), 2**31 - 1, (count,), dtype=mx.int32)
            parts.append(bits.view(mx.uint32))
        else:
            parts.append((mx.random.normal((count,)) * scale).astype(value.dtype))
        mx.eval(parts[-1])
    return (
        mx.concatenate(parts).reshape(value.shape)
        if len(parts) > 1
        else parts[0].reshape(value.shape)
    )


def random_layers(config: dict[str, Any], layers: int) -> nn.Module:
    """A model of that many layers with random weights in the config's quantization."""
    model = assemble({**config, "num_hidden_layers": layers}, None)
    mx.random.seed(0)
    for name, value in tree_flatten(model.parameters()):
        if name.endswith("biases"):
            continue
        scale = 0.002 if name.endswith("scales") else 0.02
        filled = _random_like(value, scale)
        if "norm" in name:
            filled = mx.ones_like(filled)
        mx.eval(filled)
        model.load_weights([(name, filled)], strict=False)
        if name.endswith("scales"):
            biases = (-7.5 * filled).astype(filled.dtype)
            mx.eval(biases)
            model.load_weights([(name.removesuffix("scales") + "biases", biases)], strict=False)
    return model


def loaded(folder: Path, dtype: str) -> tuple[nn.Module, dict[str, Any]]:
    """A checkpoint's model, whole, and its config."""
    checkpoint = read_checkpoint(folder)
    weights: dict[str, mx.array] = {}
    for file in sorted({tensor.file for tensor in checkpoint.tensors.values()}):
        weights.update(mx.load(str(file)))  # type: ignore[arg-type]
    return assemble(checkpoint.config, weights, dtype), checkpoint.config


def as_held(model: nn.Module) -> nn.Module:
    """Change a model in place to what a rank holds on this device; return it."""
    from k2cli.rank.attention.latent import use_own_attention
    from k2cli.rank.host_buffers import copies_from_host
    from k2cli.rank.joined_projections import join_projections, joins_here
    from k2cli.rank.kernels.device import avoid_wrong_kernels
    from k2cli.rank.kernels.experts import stays_whole
    from k2cli.sharding.latent_ways import EXPANSION_WEIGHTS, LatentSettings
    from k2cli.sharding.trace import parameters

    in_parts = copies_from_host()
    if joins_here(None):
        join_projections(model, lambda pair, _: not in_parts or stays_whole(*pair.members))
        # One by one, so that no more than one matrix exists in two forms.
        for value in parameters(model).values():
            mx.eval(value)
    avoid_wrong_kernels(model)
    use_own_attention(model, LatentSettings(EXPANSION_WEIGHTS["cuda" if in_parts else "metal"]))
    return model


def own_kernels_error(model: nn.Module) -> dict[str, float]:
    """Compare logits of k2's own kernels with those of MLX's; leave k2's."""
    from k2cli.rank.kernels.own_kernels import leave_own_kernels

    def logits() -> dict[str, list[mx.array]]:
        found: dict[str, list[mx.array]] = {}
        for rows in (1, 8):
            cache = make_cache(model)
            prompt = mx.array([[20 + row, *range(30, 70)] for row in range(rows)])
            found[f"{rows} rows"] = [model(prompt, cache=cache)[:, -1]]
            for token in (5, 6):
                found[f"{rows} rows"].append(model(mx.array([[token]] * rows), cache=cache)[:, -1])
            mx.eval(found)
        return found

    ours = logits()
    leave_own_kernels(model)
    errors = {}
    for name, theirs in logits().items():
        pairs = zip(ours[name], theirs, strict=True)
        errors[name] = max(float(relative_error(one, other)) for one, other in pairs)
    return errors


class K2:
    """k2's engine in this process, one rank."""

    def __init__(self, stage: Stage, chunk_tokens: int, context_length: int = 8192) -> None:
        self._messages: list[tuple[float, Any]] = []
        self._engine = Engine(
            Executor(stage, None),
            Followers(lambda rank, cause: None),
            self._hear,
            size=1,
            context_length=context_length,
            concurrency=8,
            prefill_chunk_tokens=chunk_tokens,
        )
        self._count = 0

    def _hear(self, messages: Sequence[RankMessage]) -> None:
        now = time.perf_counter()
        self._messages += [(now, message) for message in messages]

    def run(self, prompts: list[list[int]], count: int) -> tuple[float, float, list[list[int]]]:
        """(seconds to the first token, seconds for the others, tokens by prompt)."""
        self._messages.clear()
        started = time.perf_counter()
        names = []
        for prompt in prompts:
            self._count += 1
            names.append(str(self._count))
            self._engine.accept(Generate(names[-1], prompt, count, use_prefix_cache=False))
        while self._engine.busy:
            self._engine.advance()
        tokens: dict[str, list[int]] = {name: [] for name in names}
        first = end = 0.0
        for at, message in self._messages:
            if isinstance(message, Tokens):
                first = first or at
                tokens[message.request_id] += message.tokens
            elif isinstance(message, Finished):
                end = at
        return first - started, end - first, list(tokens.values())


def mlx_lm_run(model: nn.Module, prompt: list[int], count: int) -> tuple[float, float, list[int]]:
    """Run the same prompt with mlx-lm's ``generate_step``."""
    from mlx_lm.generate import generate_step

    started = time.perf_counter()
    tokens: list[int] = []
    first = 0.0
    for token, _ in generate_step(mx.array(prompt), model, max_tokens=count):
        first = first or time.perf_counter()
        tokens.append(int(token))
    return first - started, time.perf_counter() - first, tokens


def plain_loop(model: nn.Module, prompt: list[int], count: int) -> list[int]:
    """Generate greedily, step by step, with the model and its caches alone.

    ``generate_step`` takes the maximum after it has rounded log probabilities to the model's type:
    in bfloat16 neighbouring logits become equal so, and its tokens may differ from these.
    """
    cache = make_cache(model)
    model(mx.array([prompt[:-1]]), cache=cache)
    tokens = [prompt[-1]]
    for _ in range(count):
        logits = model(mx.array([tokens[-1:]]), cache=cache)
        tokens.append(int(cast(int, mx.argmax(logits[0, -1]).item())))
    return tokens[1:]


def mlx_lm_batch(model: nn.Module, prompts: list[list[int]], count: int) -> float:
    """Tokens per second of mlx-lm's continuous batching, the prefill of all prompts included."""
    from mlx_lm.generate import BatchGenerator

    started = time.perf_counter()
    generator = BatchGenerator(model, max_tokens=count, stop_tokens=[])
    generator.insert(prompts)
    produced = 0
    while produced < count * len(prompts):
        responses = generator.next()
        new = responses[1] if isinstance(responses, tuple) else responses
        produced += len(new)
    generator.close()
    return produced / (time.perf_counter() - started)


def _interleaved(
    ours: Callable[[], float], theirs: Callable[[], float], rounds: int
) -> dict[str, Any]:
    """Both in turn; medians, every sample, and the median of the ratios round by round."""
    samples: dict[str, list[float]] = {"k2": [], "mlx-lm": []}
    for index in range(rounds):
        pair = [("k2", ours), ("mlx-lm", theirs)]
        for name, run in pair if index % 2 == 0 else reversed(pair):
            samples[name].append(run())
    ratios = [k2 / peer for k2, peer in zip(samples["k2"], samples["mlx-lm"], strict=True)]
    return {
        "k2": statistics.median(samples["k2"]),
        "mlx_lm": statistics.median(samples["mlx-lm"]),
        "ratio": statistics.median(ratios),
        "samples": samples,
    }


def _note(text: str) -> None:
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


def measure(model: nn.Module, held: nn.Module, arguments: argparse.Namespace) -> dict[str, Any]:
    """Every figure for one model; ``held`` is k2's, which may be the same."""
    # mlx-lm's own package is imported whole here, after k2's light import of its models.
    for name in [name for name in sys.modules if name == "mlx_lm"]:
        del sys.modules[name]
    import mlx_lm.generate  # noqa: F401

    engine = K2(cut_stage(held, 0, layer_count(held)), arguments.chunk)
    short = [int(token) for token in mx.random.randint(10, 1000, (16,)).tolist()]
    long = [int(token) for token in mx.random.randint(10, 1000, (arguments.prompt + 1,)).tolist()]
    many = [[*short[:-1], 20 + index] for index in range(8)]
    results: dict[str, Any] = {}
    count = arguments.tokens
    _note("warming up")
    ours, theirs = engine.run([short], 16)[2][0], mlx_lm_run(model, short, 16)[2]
    results["same_tokens"] = ours == theirs
    results["same_tokens_as_plain_loop"] = ours == plain_loop(model, short, 16)
    pairs: dict[str, tuple[Callable[[], float], Callable[[], float]]] = {
        "decode": (
            lambda: (count - 1) / engine.run([short], count)[1],
            lambda: (count - 1) / mlx_lm_run(model, short, count)[1],
        ),
        "prefill": (
            lambda: arguments.prompt / engine.run([long], 1)[0],
            lambda: arguments.prompt / mlx_lm_run(model, long, 1)[0],
        ),
        "decode_8_requests": (
            lambda: 8 * count / sum(engine.run(many, count)[:2]),
            lambda: mlx_lm_batch(model, many, count),
        ),
    }
    for name in arguments.measure.split(","):
        ours_run, theirs_run = pairs[name]
        ours_run()  # compiles the kernels of these shapes
        theirs_run()
        _note(f"measuring {name}")
        results[f"{name}_tokens_per_second"] = _interleaved(ours_run, theirs_run, arguments.rounds)
    results["peak_memory_bytes"] = mx.get_peak_memory()
    if held is not model:
        results["own_kernels_error"] = own_kernels_error(held)
    return results


def _model(arguments: argparse.Namespace) -> nn.Module:
    if arguments.checkpoint:
        model, _ = loaded(arguments.checkpoint, arguments.dtype)
    else:
        if arguments.full_width:
            from benchmarks.mla_attention import K2_LAYER

            config = K2_LAYER | {"first_k_dense_replace": 1, "vocab_size": 163_840}
        else:
            config = json.loads(arguments.config.read_text())
        model = random_layers(config, arguments.layers)
    mx.eval(model.parameters())
    return model


def main() -> None:
    """Read the options, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", type=Path)
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--full-width", action="store_true", help="K2's config, 4 bit")
    parser.add_argument("--as-held", action="store_true", help="k2's model as a rank holds it")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--prompt", type=int, default=2048)
    parser.add_argument("--chunk", type=int, default=2048)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", default="checkpoint")
    parser.add_argument("--measure", default="decode,prefill,decode_8_requests")
    arguments = parser.parse_args()
    model = _model(arguments)
    held = as_held(_model(arguments)) if arguments.as_held else model
    weights_bytes = sum(value.nbytes for _, value in tree_flatten(model.parameters()))
    device = mx.device_info() if mx.default_device().type == mx.DeviceType.gpu else {"cpu": True}
    results = measure(model, held, arguments)
    json.dump(
        {"device": str(device), "weights_bytes": weights_bytes, **results}, sys.stdout, indent=1
    )
    sys.stdout.write("\n")


if __name__ == "__main__":
    main()
