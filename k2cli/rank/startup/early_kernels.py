"""Kernels of a pipeline's later stages, compiled while the stages before them compute.

On CUDA MLX compiles most kernels when they are first used, and the first step of a shape takes up
to a minute on a cold start. A stage computes when the hidden states of the stage before it arrive,
so the stages would compile one after the other. Instead a later stage computes such a step with
made-up hidden states and copies of its caches first. It would wait at that time anyway. Then it
computes the step itself, which it has the kernels for. Kernels depend on shapes and element types,
never on values.

This ends with the warm-up: the caches of requests may be too large for copies.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import mlx.core as mx

from k2cli.rank.host_buffers import copies_from_host
from k2cli.rank.kv_cache.kept_prefixes import LayerCaches
from k2cli.sharding.architectures import MODEL_FAILURES
from k2cli.sharding.stage import Stage


class EarlyKernels:
    """Computes steps of one stage with made-up hidden states; does nothing until ``begin``.

    Args:
        evaluate: computes the caches of a step, layer by layer.
    """

    def __init__(self, stage: Stage, evaluate: Callable[[LayerCaches], None]) -> None:
        self._stage = stage
        self._evaluate = evaluate
        self._compiles = False

    def begin(self) -> None:
        """Begin, if this stage waits for another one and the device compiles kernels."""
        self._compiles = not self._stage.is_first and copies_from_host()

    def end(self) -> None:
        """Compile nothing early from now on."""
        self._compiles = False

    def compile_for(self, tokens: mx.array, caches: LayerCaches, *, with_output: bool) -> None:
        """Compute a step whose hidden states have not arrived, and forget its results.

        An error is none of the step: it needs less memory, and fails itself if the device does.
        After an error nothing is compiled early.

        Args:
            tokens: ``[rows, length]``, of which the shape is used.
            caches: those of the step, with room for it; not changed.
            with_output: whether the step computes its output, and not its caches alone.
        """
        if not self._compiles:
            return
        stage = self._stage
        try:
            copies = copy.deepcopy(caches)  # arrays are shared until one is written to
            output = stage.forward(tokens, stage.complete(copies), self._made_up(*tokens.shape))
            self._evaluate(copies)
            if with_output:
                mx.eval(output)
        except (*MODEL_FAILURES, MemoryError):
            self.end()

    def _made_up(self, rows: int, length: int) -> mx.array:
        """Return hidden states that no short period repeats, so that experts vary as with text."""
        width = self._stage.width
        waves = mx.cos(mx.arange(rows * length * width, dtype=mx.float32) * 1.7)
        return waves.astype(self._stage.dtype).reshape(rows, length, width)
