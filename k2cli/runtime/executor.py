"""Carries out decisions on one rank: KV caches by sequence, and forward steps through its part.

Leader and followers run the same code on the same decisions in the same order; nothing here
decides anything. Hidden states travel from the higher rank (earlier stage) to the lower one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from k2cli.runtime.protocol import CloseSequence, Decision, Forward, OpenSequence
from k2cli.sharding.stage import Stage


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a step gave on this rank.

    ``logits`` is ``[vocabulary]`` for the last token of a step with ``last`` set, on ranks that
    have the head. The digests are empty unless the step asked for them.
    """

    logits: mx.array | None = None
    arrived_digest: str = ""
    computed_digest: str = ""


def array_digest(value: mx.array) -> str:
    """SHA-256 (hex, 16 digits) over the bytes of an array."""
    flat = mx.contiguous(value).reshape(-1).view(mx.uint8)
    return hashlib.sha256(bytes(np.asarray(flat))).hexdigest()[:16]


class Executor:
    """One rank's model part and the caches of the sequences that are open."""

    def __init__(
        self, stage: Stage, group: Any | None, on_layer: Callable[[], None] = lambda: None
    ) -> None:
        """``on_layer`` is called whenever a layer's work of a step is known to be done."""
        self._stage = stage
        self._group = group
        self._on_layer = on_layer
        self._caches: dict[int, list[Any]] = {}

    def carry_out(self, decision: Decision) -> StepResult:
        """Do what the leader decided."""
        match decision:
            case OpenSequence(sequence=sequence):
                self._caches[sequence] = self._stage.make_cache()
            case CloseSequence(sequence=sequence):
                self._caches.pop(sequence, None)
                mx.clear_cache()
            case Forward():
                return self._forward(decision)
        return StepResult()

    def _forward(self, step: Forward) -> StepResult:
        tokens = mx.array([step.tokens], dtype=mx.int32)
        cache = self._caches[step.sequence]
        arrived = self._receive(len(step.tokens))
        output = self._stage.forward(tokens, cache, arrived)
        if not step.last or len(step.tokens) > 1:
            self._evaluate_by_layer(cache)
        if self._stage.is_last:
            return self._finish_logits(step, output, arrived)
        return self._send(step, output, arrived)

    def _receive(self, length: int) -> mx.array | None:
        """Hidden states from the stage before: ``[1, length, width]``."""
        if self._stage.is_first:
            return None
        assert self._group is not None
        arrived = mx.distributed.recv(
            (1, length, self._stage.width),
            self._stage.dtype,
            self._group.rank() + 1,
            group=self._group,
        )
        # Evaluated apart from the layers: no long GPU command buffer may wait for a network.
        mx.eval(arrived)
        return arrived

    def _send(self, step: Forward, output: mx.array, arrived: mx.array | None) -> StepResult:
        assert self._group is not None
        mx.eval(output)
        self._on_layer()
        mx.eval(mx.distributed.send(output, self._group.rank() - 1, group=self._group))
        return self._digests(step, arrived, output)

    def _finish_logits(
        self, step: Forward, output: mx.array, arrived: mx.array | None
    ) -> StepResult:
        if not step.last:
            return StepResult()
        logits = output[0, -1]
        mx.eval(logits)
        self._on_layer()
        digests = self._digests(step, arrived, mx.argmax(logits))
        return StepResult(logits, digests.arrived_digest, digests.computed_digest)

    def _digests(self, step: Forward, arrived: mx.array | None, computed: mx.array) -> StepResult:
        if not step.digest:
            return StepResult()
        handed = "" if arrived is None else array_digest(arrived)
        return StepResult(None, handed, array_digest(computed))

    def _evaluate_by_layer(self, cache: list[Any]) -> None:
        """Compute a long step layer by layer: bounds each evaluation, and shows progress."""
        for entry in self._stage.local(cache):
            mx.eval(entry.state)
            self._on_layer()
