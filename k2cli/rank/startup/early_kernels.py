"""Kernels that are compiled before the step that needs them, where another rank would wait.

On CUDA MLX compiles most kernels when they are first used, and the first step of a shape takes up
to a minute on a cold start. A stage computes when the hidden states of the stage before it arrive,
so the stages would compile one after the other. Instead a later stage computes such a step with
made-up hidden states and copies of its caches first. It would wait at that time anyway. Then it
computes the step itself, which it has the kernels for. Kernels depend on shapes and element types,
never on values.

On Metal, kernels are compiled at their first use on a machine. A tensor rank that has them would
wait for one that has not, with its GPU, and macOS ends a GPU that waits some five seconds for
another rank (mlx-examples#1185). So tensor ranks compute small steps alone first, without sums.

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
from k2cli.sharding.trace import without_collectives

_MOST_TOKENS = 256
"""Tokens of a step that tensor ranks compute alone first. Larger ones need few kernels more."""


class EarlyKernels:
    """Computes steps of one stage with made-up hidden states; does nothing until ``begin``.

    Args:
        evaluate: computes the caches of a step, layer by layer.
        sums: True for a tensor rank.
    """

    def __init__(
        self, stage: Stage, evaluate: Callable[[LayerCaches], None], *, sums: bool = False
    ) -> None:
        self._stage = stage
        self._evaluate = evaluate
        self._sums = sums
        self._compiles = False

    def begin(self) -> None:
        """Begin, if another rank would wait and the device compiles kernels."""
        later = not self._stage.is_first and copies_from_host()
        self._compiles = later or (self._sums and mx.metal.is_available())

    def end(self) -> None:
        """Compile nothing early from now on."""
        self._compiles = False

    def compile_for(self, tokens: mx.array, caches: LayerCaches, *, with_output: bool) -> None:
        """Compute a step without anything of other ranks, and forget its results.

        An error is none of the step: it needs less memory, and fails itself if the device does.
        After an error nothing is compiled early.

        Args:
            tokens: ``[rows, length]``, of which the shape is used.
            caches: those of the step, with room for it; not changed.
            with_output: whether the step computes its output, and not its caches alone.
        """
        if not self._compiles or (self._sums and tokens.size > _MOST_TOKENS):
            return
        stage = self._stage
        try:
            copies = copy.deepcopy(caches)  # arrays are shared until one is written to
            arrived = None if stage.is_first else self._made_up(*tokens.shape)
            with without_collectives():
                output = stage.forward(tokens, stage.complete(copies), arrived)
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
