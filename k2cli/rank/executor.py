"""Carries out decisions on one rank: its caches, and forward steps through its part.

Leader and followers run the same code on the same decisions in the same order; nothing here
decides anything. Hidden states travel from the higher rank (earlier stage) to the lower one, on
a stream of their own, so that sending one step's does not hold up computing the next.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import mlx.core as mx

from k2cli.errors import UsageError
from k2cli.protocol import (
    CloseSequence,
    Decision,
    Decode,
    DropPrefix,
    JoinBatch,
    LeaveBatch,
    OpenSequence,
    Prefill,
    PrefillTogether,
    Quit,
    Tick,
)
from k2cli.protocol.progress_page import Phase
from k2cli.rank.caches import CacheTable, LayerCaches, make_room
from k2cli.sharding.stage import Stage, hidden_at

if TYPE_CHECKING:
    from typing_extensions import Buffer


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a decision gave on this rank.

    ``logits`` is ``[rows, vocabulary]`` after a Decode on ranks that have the head; lazy on the
    leader. The digests are empty unless they were asked for. ``in_step``, lazy too, says whether
    the ranks still add up what belongs together (a bool; see ``_in_step``).
    """

    logits: mx.array | None = None
    in_step: mx.array | None = None
    arrived_digest: str = ""
    computed_digest: str = ""
    state_digest: str = ""

    @property
    def to_compute(self) -> list[mx.array]:
        """What is still lazy, in the order in which every rank must compute it."""
        return [array for array in (self.logits, self.in_step) if array is not None]


def array_digest(value: mx.array) -> str:
    """SHA-256 (hex, 16 digits) over the bytes of an array."""
    flat = mx.contiguous(value).reshape(-1).view(mx.uint8)
    # Its type stub does not say so, but an mlx array gives out its memory.
    return hashlib.sha256(cast("Buffer", flat)).hexdigest()[:16]


def _hidden_of(stage: Stage) -> tuple[int, mx.Dtype]:
    """Width and dtype of what tensor ranks add up; of no use where layers exchange several."""
    try:
        return hidden_at(stage.model, 0)
    except UsageError:
        return 1, mx.float32


class Executor:
    """One rank's model part and all its caches."""

    def __init__(
        self,
        stage: Stage,
        group: Any | None,
        advance: Callable[[Phase], None] = lambda phase: None,
    ) -> None:
        """``advance`` is called whenever a layer's work is done, and before waiting for a peer."""
        self.stage = stage
        self.caches = CacheTable(stage)
        self._group = group
        self._advance = advance
        # For other ranks' hidden states, since the start.
        self.waited_seconds = 0.0
        self._on_gpu = mx.default_device() == mx.gpu
        self._transfers = mx.new_stream(mx.cpu)
        self._departing: mx.array | None = None
        self._fed: mx.array | None = None
        self._hidden: tuple[int, mx.Dtype] | None = None

    @property
    def is_pipeline(self) -> bool:
        """Whether hidden states go from rank to rank."""
        return not (self.stage.is_first and self.stage.is_last)

    def carry_out(self, decision: Decision, chosen: mx.array | None = None) -> StepResult:
        """Do what the leader decided.

        Args:
            chosen: uint32 ``[rows]``, lazy, on the leader: the inputs of a Decode that was decided
                ahead.
        """
        match decision:
            case Decode():
                return self._decode(decision, chosen)
            case Prefill(sequence=sequence, tokens=tokens):
                self.caches.feed(sequence, tokens)
                self._prefill(mx.array([tokens], dtype=mx.int32), self.caches.sequences[sequence])
            case PrefillTogether():
                self._prefill_together(decision)
            case OpenSequence(sequence=sequence, prefix=prefix, kept_tokens=kept_tokens):
                self.caches.open(sequence, prefix, kept_tokens)
            case CloseSequence(sequence=sequence, keep_as=keep_as):
                self.caches.close(sequence, keep_as)
            case JoinBatch(batch=batch, sequence=sequence):
                self.caches.join(batch, sequence)
            case LeaveBatch():
                if decision.told >= 0:
                    self.caches.feed(decision.sequence, [decision.told])
                self.caches.leave(
                    decision.batch, decision.sequence, decision.keep_as, decision.move_to
                )
            case DropPrefix(prefix=prefix):
                self.caches.drop_prefix(prefix)
            case Tick() | Quit():
                pass
        return StepResult()

    def _prefill(self, tokens: mx.array, caches: LayerCaches) -> None:
        rows, length = tokens.shape
        make_room(caches, length)
        arrived = self._receive(rows, length)
        output = self.stage.forward(tokens, self.stage.complete(caches), arrived)
        self._wait_for(arrived)
        # Layer by layer: bounds each evaluation, and shows the guard that work gets on.
        for entry in caches:
            mx.eval(entry.state)
            if self._on_gpu:
                mx.synchronize()  # a GPU gives back what a layer took only some time after it
            self._advance("busy")
        if not self.stage.is_last:
            self._send(output)

    def _prefill_together(self, decision: PrefillTogether) -> None:
        lengths = [len(tokens) for tokens in decision.tokens]
        longest = max(lengths)
        padded = [[0] * (longest - len(tokens)) + tokens for tokens in decision.tokens]
        for sequence, tokens in zip(decision.sequences, decision.tokens, strict=True):
            self.caches.feed(sequence, tokens)
        caches = self.caches.open_together(lengths)
        self._prefill(mx.array(padded, dtype=mx.int32), caches)
        self.caches.join_together(decision.batch, decision.sequences, caches)

    def _decode(self, step: Decode, chosen: mx.array | None) -> StepResult:
        batch = self.caches.batches[step.batch]
        for tokens in (step.told, step.tokens):
            for sequence, token in zip(batch.rows, tokens, strict=False):
                if token >= 0:
                    self.caches.feed(sequence, [token])
        inputs = (
            self._inputs_ahead(len(batch.rows), chosen)
            if step.ahead
            else mx.array(step.tokens, dtype=mx.int32)
        )
        make_room(batch.caches, 1)
        arrived = self._receive(inputs.size, 1)
        output = self.stage.forward(inputs[:, None], self.stage.complete(batch.caches), arrived)
        self._wait_for(
            inputs if step.ahead and self.is_pipeline and self.stage.is_first else arrived
        )
        computed = output[:, -1] if self.stage.is_last else output
        if not self.stage.is_last:
            self._send(computed)
        digest_of = mx.argmax(computed, axis=-1) if self.stage.is_last else computed
        return StepResult(
            logits=computed if self.stage.is_last else None,
            in_step=self._in_step(step.step, computed) if step.state_digest else None,
            arrived_digest="" if arrived is None or not step.digest else array_digest(arrived),
            computed_digest=array_digest(digest_of) if step.digest else "",
            state_digest=self.caches.digest(step.step) if step.state_digest else "",
        )

    def _in_step(self, step: int, computed: mx.array) -> mx.array | None:
        """In tensor parallelism: whether a sum over ranks of this step's mark is what it must be.

        Sums are paired by nothing but their order. A rank that did one too many or too few would
        add up what does not belong together from then on, without any error, and compute wrong
        text; this sum shows it, since its terms are known. It comes after all else of the step,
        and has the size of the others: of another size it would stall instead.
        """
        if self._group is None or self._group.size() == 1 or self.is_pipeline:
            return None
        width, dtype = self._hidden = self._hidden or _hidden_of(self.stage)
        size = self._group.size()
        # Integers up to 256 are exact in every float type that hidden states have.
        mark = step % (256 // size) + 1
        own = mx.depends(mx.full((len(computed), 1, width), mark, dtype=dtype), computed)
        return mx.all(mx.distributed.all_sum(own, group=self._group) == size * mark)

    def feed_ahead(self, chosen: mx.array) -> None:
        """The leader of a pipeline: hand the inputs of a step decided ahead to the first stage.

        Args:
            chosen: uint32 ``[rows]``, lazy.
        """
        assert self._group is not None
        self._fed = mx.distributed.send(
            chosen, self._group.size() - 1, group=self._group, stream=self._transfers
        )
        mx.async_eval(self._fed)  # type: ignore[no-untyped-call]

    def _inputs_ahead(self, rows: int, chosen: mx.array | None) -> mx.array:
        """The inputs of a step decided ahead, lazily: uint32 ``[rows]``.

        In tensor parallelism they come as a sum over ranks to which only the leader adds anything.
        In a pipeline only the first stage has a use for them; elsewhere their shape is enough.
        """
        nothing = mx.zeros((rows,), dtype=mx.uint32)
        if self._group is None or self._group.size() == 1:
            assert chosen is not None
            return chosen
        if not self.is_pipeline:
            own = nothing if chosen is None else chosen
            return mx.distributed.all_sum(own, group=self._group)
        if not self.stage.is_first:
            return nothing
        return mx.distributed.recv((rows,), mx.uint32, 0, group=self._group, stream=self._transfers)

    def _receive(self, rows: int, length: int) -> mx.array | None:
        """Hidden states from the stage before, lazily: ``[rows, length, width]``."""
        if self.stage.is_first:
            return None
        assert self._group is not None
        return mx.distributed.recv(
            (rows, length, self.stage.width),
            self.stage.dtype,
            self._group.rank() + 1,
            group=self._group,
            stream=self._transfers,
        )

    def _wait_for(self, arrived: mx.array | None) -> None:
        """Wait for what another rank sends, once the work on it has been laid out.

        They are waited for here and not inside that work: a GPU must not wait for a network.
        """
        if arrived is not None:
            self._advance("waiting")
            since = time.monotonic()
            mx.eval(arrived)
            self.waited_seconds += time.monotonic() - since
            self._advance("busy")

    def _send(self, output: mx.array) -> None:
        """Start sending hidden states ``[rows, length, width]`` to the next stage."""
        assert self._group is not None
        mx.eval(output)
        self._advance("busy")
        self._departing = mx.distributed.send(
            output, self._group.rank() - 1, group=self._group, stream=self._transfers
        )
        mx.async_eval(self._departing)  # type: ignore[no-untyped-call]
