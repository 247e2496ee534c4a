"""Measure memory beside weights and KV cache: MLX's peak over a grid of steps.

    python -m benchmarks.activation_grid --config CONFIG_JSON --layers 6
    python -m benchmarks.activation_grid --checkpoint FOLDER --dtype float32
    python -m benchmarks.activation_grid --config benchmarks/data/recurrent/mamba2.json --layers 0

For every chunk and context, the peak of memory while k2's executor computes the last chunk of a
prompt of that length; for every number of rows and context, the peak of decode steps. The cache
before it is filled with zeros of the right shape, whose values memory does not depend on. Prints
one JSON document, with the planner's figure for each point.

MLX holds what a step reads until the GPU has done with it. How much that is depends on how far the
GPU is behind the program, which differs from run to run with a few layers, while with a whole
model it is always behind. So on CUDA a kernel that only waits keeps the GPU busy while a step is
built: the peak is then the largest there can be, and the same in every run.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from benchmarks.gpu_layers import loaded, random_layers
from k2cli.choices import Device
from k2cli.files import write_atomically
from k2cli.planning.memory.decode import decode_activation
from k2cli.planning.memory.prefill import ActivationShape, prefill_activation, shape_of_model
from k2cli.planning.memory.quantized_kv import quantized_decode_bytes, quantized_prefill_bytes
from k2cli.protocol import Decode, JoinBatch, LeaveBatch, OpenSequence, Prefill
from k2cli.rank.executor import Executor
from k2cli.sharding.assemble import cast
from k2cli.sharding.kv_cache.attention import use_own_quantized_attention
from k2cli.sharding.kv_cache.quantized import QuantizedCache
from k2cli.sharding.profile import profile_model
from k2cli.sharding.stage import cut_stage, make_cache
from k2cli.sharding.trace import layer_count

_PROBE_TOKENS = 8
_DECODE_STEPS = 4
# Longer than building a step takes, on a GPU of at most 2 GHz.
_BUSY_CYCLES = 200_000_000
_BUSY = """
long long started = clock64();
while (clock64() - started < cycles[0]) {}
out[0] = 1.0f;
"""


@dataclass(frozen=True, slots=True)
class Point:
    """One measurement. ``chunk`` is 1 in decode; ``rows`` sequences have ``context`` tokens each.

    ``peak_bytes`` is beside weights and cache, ``modelled_bytes`` what the planner says of it, the
    copy of one layer's growing cache (``growth_bytes``) not included.
    """

    phase: str
    chunk: int
    context: int
    rows: int
    peak_bytes: int
    cache_bytes: int
    growth_bytes: int
    modelled_bytes: int


class Grid:
    """Measures points on one model with a given device of the activation model."""

    def __init__(
        self, model: Any, config: dict[str, Any], device: Any, itemsize: int, kv_bits: int = 0
    ) -> None:
        self._stage = cut_stage(model, 0, layer_count(model))
        self._stage.kv_bits = kv_bits
        self._quantized = profile_model(model, kv_bits).quantized_layer
        if kv_bits:
            use_own_quantized_attention()
        self._model = model
        self._shape = shape_of_model(config, model)
        self._device = device
        self._itemsize = itemsize
        self._layers = layer_count(model)
        caches = make_cache(model)
        self._keeps_states = any(
            not hasattr(part, "keys")
            for cache in caches
            for part in getattr(cache, "caches", (cache,))
        )
        _start()
        # Includes the rounding of the allocator, which a plan counts as slack.
        self._weights = mx.get_active_memory()
        self._step = 0

    @property
    def recurrent(self) -> bool:
        """True if a layer of the model keeps a state in place of keys and values."""
        return self._keeps_states

    def _number(self) -> int:
        self._step += 1
        return self._step

    def _filled(self, executor: Executor, sequence: int, tokens: int) -> None:
        """Open a sequence whose cache holds ``tokens`` tokens."""
        executor.carry_out(OpenSequence(self._number(), sequence))
        executor.carry_out(Prefill(self._number(), sequence, [1] * min(_PROBE_TOKENS, tokens)))
        for cache in _with_keys(executor.caches.sequences[sequence]):
            if isinstance(cache, QuantizedCache):
                if (form := cache.form) is not None:
                    cache.keys, cache.values, cache.used = None, None, 0
                    cache.update_and_fetch(*form.zeros(tokens))
                    mx.eval(cache.state)
                continue
            keys, values, *rest = cache.state
            wide = [
                mx.zeros((*part.shape[:2], tokens, part.shape[3]), part.dtype)
                for part in (keys, values)
            ]
            mx.eval(wide)
            # A cache with a window has its next place behind the offset: the same, until it wraps.
            cache.state = (*wide, *(tokens if isinstance(each, int) else each for each in rest))

    def prefill(self, chunk: int, context: int) -> Point:
        """Measure the last chunk of a prompt of ``context`` tokens."""
        executor = Executor(self._stage, None)
        before = context - chunk
        if before:
            self._filled(executor, 1, before)
        else:
            executor.carry_out(OpenSequence(self._number(), 1))
        caches = executor.caches.sequences[1]
        _start()
        if not self._keeps_states:
            executor.carry_out(Prefill(self._number(), 1, [1] * chunk))
        else:
            # The states of all layers at once, as mlx-lm does; k2 takes less, layer by layer.
            self._model(mx.ones((1, chunk), mx.int32), cache=caches)
            mx.eval([cache.state for cache in caches])
            mx.synchronize()
        modelled = prefill_activation(
            self._shape,
            device=self._device,
            chunk_tokens=chunk,
            context_length=context,
            concurrency=1,
            itemsize=self._itemsize,
        ).peak_bytes
        if self._quantized is not None:
            modelled += quantized_prefill_bytes(
                self._quantized,
                device=self._device,
                context_length=context,
                itemsize=self._itemsize,
            )
        return self._point("prefill", chunk, context, 1, caches, modelled)

    def decode(self, rows: int, context: int) -> Point:
        """Measure decode steps of a batch whose sequences then have ``context`` tokens each.

        The first step makes the cache grow.
        """
        executor = Executor(self._stage, None)
        for row in range(rows):
            self._filled(executor, row, context - _DECODE_STEPS)
            executor.carry_out(JoinBatch(self._number(), 0, row))
            mx.eval([cache.state for cache in executor.caches.batches[0].caches])
        _start()
        for step in range(_DECODE_STEPS):
            # Not before the first: growing waits for the GPU.
            waiting = _keep_busy() if step and self._device == "cuda" else None
            result = executor.carry_out(Decode(self._number(), 0, [1] * rows))
            mx.async_eval(result.logits)  # type: ignore[no-untyped-call]
            mx.synchronize()
            del result, waiting
        caches = executor.caches.batches[0].caches
        modelled = modelled_decode_bytes(
            self._shape, self._device, context, rows, self._itemsize, self._layers
        )
        if self._quantized is not None:
            modelled += quantized_decode_bytes(
                self._quantized,
                self._shape,
                device=self._device,
                context_length=context,
                concurrency=rows,
                itemsize=self._itemsize,
                slices=1,
            )
        point = self._point("decode", 1, context, rows, caches, modelled)
        for row in range(rows):
            executor.carry_out(LeaveBatch(self._number(), 0, row))
        return point

    def _point(
        self, phase: str, chunk: int, context: int, rows: int, caches: list[Any], modelled: int
    ) -> Point:
        peak = mx.get_peak_memory()
        held = sum(cache.nbytes for cache in caches)
        return Point(
            phase,
            chunk,
            context,
            rows,
            peak - self._weights - held,
            held,
            max((part.nbytes for part in _with_keys(caches)), default=0),
            modelled,
        )


def modelled_decode_bytes(
    shape: ActivationShape, device: Device, context: int, rows: int, itemsize: int, layers: int
) -> int:
    """Return the planner's peak of a decode step, without the sampler's copies of logits."""
    activation = decode_activation(
        shape,
        device=device,
        context_length=context,
        concurrency=rows,
        itemsize=itemsize,
        layers=layers,
        samples=False,
    )
    return activation.peak_bytes + rows * shape.vocabulary * itemsize


def _with_keys(caches: list[Any]) -> Iterator[Any]:
    """Yield the caches that have keys and values; a state does not depend on the context."""
    for cache in caches:
        for part in getattr(cache, "caches", (cache,)):
            if hasattr(part, "keys"):
                yield part


def _keep_busy() -> mx.array:
    """Start a kernel that does nothing for a tenth of a second."""
    kernel: Any = mx.fast.cuda_kernel(
        name="busy", input_names=["cycles"], output_names=["out"], source=_BUSY
    )
    (out,) = kernel(
        inputs=[mx.array([_BUSY_CYCLES], mx.int64)],
        grid=(1, 1, 1),
        threadgroup=(1, 1, 1),
        output_shapes=[(1,)],
        output_dtypes=[mx.float32],
    )
    mx.async_eval(out)  # type: ignore[no-untyped-call]
    return out  # type: ignore[no-any-return]


def _start() -> None:
    """Begin a measurement; models from before must not be freed while it goes on, or count."""
    gc.collect()
    mx.synchronize()
    mx.clear_cache()
    mx.reset_peak_memory()


def points(
    grid: Grid,
    chunks: Sequence[int],
    contexts: Sequence[int],
    rows: Sequence[int],
    most: int,
    runs: int = 3,
) -> Iterator[Point]:
    """Measure every point whose modelled need is at most ``most`` bytes."""
    for context in contexts:
        for chunk in (chunk for chunk in chunks if chunk <= context):
            modelled = prefill_activation(
                grid._shape, device=grid._device, chunk_tokens=chunk, context_length=context,
                concurrency=1, itemsize=grid._itemsize,
            ).peak_bytes  # fmt: skip
            if modelled <= most:
                # On a GPU, which computes asynchronously, the peak differs between runs.
                yield max((grid.prefill(chunk, context) for _ in range(runs)), key=_peak)
        for count in rows:
            modelled = modelled_decode_bytes(
                grid._shape, grid._device, context, count, grid._itemsize, grid._layers
            )
            if modelled <= most and count * context <= 8 * 32_768:
                yield max((grid.decode(count, context) for _ in range(runs)), key=_peak)


def _peak(point: Point) -> int:
    return point.peak_bytes


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def main() -> None:
    """Read the options, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", type=Path)
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--layers", type=int, default=6, help="0: as the config says")
    parser.add_argument("--dtype", default="checkpoint")
    parser.add_argument("--chunks", type=_numbers, default=[32, 128, 512, 2048])
    parser.add_argument("--contexts", type=_numbers, default=[512, 2048, 8192, 32768])
    parser.add_argument("--rows", type=_numbers, default=[1, 4, 8])
    parser.add_argument("--most-bytes", type=int, default=4 * 10**9)
    parser.add_argument("--label", default="")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--out", type=Path, help="written after each point; else the output")
    parser.add_argument("--kv-bits", type=int, default=0, help="quantize the KV cache")
    given = parser.parse_args()
    if given.checkpoint:
        model, config = loaded(given.checkpoint, given.dtype)
    else:
        config = json.loads(given.config.read_text())
        given.layers = given.layers or config["num_hidden_layers"]
        model = random_layers(config, given.layers)
        if given.dtype != "checkpoint":
            cast(model, getattr(mx, given.dtype))
    mx.eval(model.parameters())
    device = "cuda" if mx.cuda.is_available() else "metal" if mx.metal.is_available() else "cpu"
    probe = model(mx.array([[1]], mx.int32))
    mx.eval(probe)
    grid = Grid(model, config, device, probe.dtype.size, given.kv_bits)
    found: list[dict[str, Any]] = []
    document = {
        "label": given.label or str(given.config or given.checkpoint),
        "backend": device,
        "layers": layer_count(model),
        "itemsize": probe.dtype.size,
        "recurrent": grid.recurrent,
        "config": config,
        "points": found,
    }
    for point in points(
        grid, given.chunks, given.contexts, given.rows, given.most_bytes, given.runs
    ):
        found.append(asdict(point))
        sys.stderr.write(
            f"{point.phase} chunk {point.chunk} context {point.context} rows {point.rows}: "
            f"{point.peak_bytes / 1e6:.1f} MB, modelled {point.modelled_bytes / 1e6:.1f} "
            f"+ {point.growth_bytes / 1e6:.1f} MB\n"
        )
        if given.out:
            write_atomically(given.out, json.dumps(document, indent=1) + "\n")
    if not given.out:
        json.dump(document, sys.stdout, indent=1)
        sys.stdout.write("\n")


if __name__ == "__main__":
    main()
