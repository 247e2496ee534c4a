"""Measure quantized KV caches: perplexity, bytes per token, and time of decode.

    python -m benchmarks.quantized_kv --checkpoint FOLDER --text FILE
    python -m benchmarks.quantized_kv --decode --contexts 2048,8192

*Perplexity*: a text is computed in chunks, as a prompt is, and then its last part token by token,
as an answer is, so that both ways of reading a quantized cache count.

*Decode*: the time of a step after a long context, of layers with random weights and keys. The bits
take turns, round by round; the median of each is compared with that of the cache that is not
quantized. Prints one line of JSON per measurement.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from tokenizers import Tokenizer

from benchmarks.gpu_layers import loaded, random_layers
from k2cli.sharding.assemble import cast
from k2cli.sharding.kv_cache.attention import use_own_quantized_attention
from k2cli.sharding.stage import make_cache

BITS = (0, 8, 4)
CHUNK_TOKENS = 256
# Grouped queries like those of Llama 405B (16 heads for a head of keys and values), but narrow.
LAYERS: dict[str, Any] = {
    "model_type": "llama", "hidden_size": 1024, "num_attention_heads": 16, "head_dim": 128,
    "num_key_value_heads": 1, "intermediate_size": 1024, "num_hidden_layers": 4,
    "vocab_size": 1000, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0, "tie_word_embeddings": False,
}  # fmt: skip


def mean_loss(model: nn.Module, tokens: list[int], kv_bits: int, stepwise: int) -> float:
    """Return the mean negative logarithm of the probability of each token but the first."""
    cache = make_cache(model, kv_bits)
    inputs, targets = tokens[:-1], tokens[1:]
    in_chunks = len(inputs) - stepwise
    bounds = [*range(0, in_chunks, CHUNK_TOKENS), *range(in_chunks, len(inputs) + 1)]
    losses = 0.0
    for first, past_last in itertools.pairwise(bounds):
        logits = model(mx.array([inputs[first:past_last]]), cache=cache)
        wanted = mx.array(targets[first:past_last])
        loss = nn.losses.cross_entropy(logits[0].astype(mx.float32), wanted, reduction="sum")
        losses += float(loss.item())
    return losses / len(inputs)


def cache_bytes(model: nn.Module, kv_bits: int) -> float:
    """Return the bytes of a token in the caches of all layers."""
    cache = make_cache(model, kv_bits)
    tokens = cache[0].step if hasattr(cache[0], "step") else 256
    model(mx.zeros((1, tokens), dtype=mx.int32), cache=cache)
    return sum(entry.nbytes for entry in cache) / tokens


def measure_perplexity(checkpoint: Path, text: Path, dtype: str, most: int, stepwise: int) -> None:
    """Print the perplexity of a text and the bytes per token, for each number of bits."""
    model, _ = loaded(checkpoint, dtype)
    mx.eval(model.parameters())
    tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    tokens = tokenizer.encode(text.read_text()).ids[:most]
    for bits in BITS:
        loss = mean_loss(model, tokens, bits, min(stepwise, len(tokens) - 1))
        _print(
            kv_bits=bits, tokens=len(tokens), dtype=dtype, loss=round(loss, 5),
            perplexity=round(math.exp(loss), 4), bytes_per_token=cache_bytes(model, bits),
        )  # fmt: skip


def _filled(model: nn.Module, kv_bits: int, context: int) -> list[Any]:
    """Make caches of ``context`` tokens of random keys and values."""
    cache = make_cache(model, kv_bits)
    args: Any = model.args
    shape = (1, args.num_key_value_heads, context, args.head_dim)
    dtype = model.parameters()["model"]["norm"]["weight"].dtype
    for entry in cache:
        entry.update_and_fetch(*(mx.random.normal(shape).astype(dtype) for _ in range(2)))
        mx.eval(entry.state)
    return cache


def measure_decode(contexts: list[int], rounds: int, dtype: str) -> None:
    """Print the median time of a step for each context and number of bits."""
    model = random_layers(LAYERS, LAYERS["num_hidden_layers"])
    cast(model, getattr(mx, dtype))
    mx.eval(model.parameters())
    for context in contexts:
        caches = {bits: _filled(model, bits, context) for bits in BITS}
        seconds: dict[int, list[float]] = {bits: [] for bits in BITS}
        for number in range(rounds + 1):
            for bits, cache in caches.items():
                started = time.perf_counter()
                mx.eval(model(mx.array([[1]]), cache=cache))
                if number:  # not the first, in which caches grow
                    seconds[bits].append(time.perf_counter() - started)
        plain = statistics.median(seconds[0])
        for bits in BITS:
            median = statistics.median(seconds[bits])
            _print(
                context=context, kv_bits=bits, dtype=dtype, rounds=rounds,
                milliseconds=round(1e3 * median, 2), ratio=round(median / plain, 3),
            )  # fmt: skip


def _print(**fields: Any) -> None:
    sys.stdout.write(json.dumps(fields) + "\n")
    sys.stdout.flush()


def main() -> None:
    """Read the options and measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--text", type=Path, default=Path("docs/design/architecture.md"))
    parser.add_argument("--tokens", type=int, default=400)
    parser.add_argument("--stepwise", type=int, default=30)
    parser.add_argument("--decode", action="store_true")
    parser.add_argument("--contexts", default="2048,8192,32768")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--dtype", default="float32")
    given = parser.parse_args()
    use_own_quantized_attention()
    if given.decode:
        contexts = [int(each) for each in given.contexts.split(",")]
        measure_decode(contexts, given.rounds, given.dtype)
    if given.checkpoint is not None:
        measure_perplexity(given.checkpoint, given.text, given.dtype, given.tokens, given.stepwise)


if __name__ == "__main__":
    main()
