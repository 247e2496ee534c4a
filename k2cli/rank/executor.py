"""Execution of the leader's decisions on one rank: its caches, and forward steps of its part.

Leader and followers run the same code on the same decisions in the same order; this module makes no
decisions. ``exchange`` has what ranks send to each other meanwhile.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any, Protocol, cast

import mlx.core as mx

from k2cli.errors import ClusterError
from k2cli.prefix_folder import BLOCK_TOKENS
from k2cli.protocol import (
    AdoptBlocks,
    CloseSequence,
    CutBack,
    Decision,
    Decode,
    DropPrefix,
    ForgetBlocks,
    JoinBatch,
    LeaveBatch,
    Marks,
    OpenSequence,
    OpenStore,
    Prefill,
    PrefillTogether,
    Quit,
    ReadBlocks,
    SplitPrefix,
    StoreBlock,
    Tick,
    Warm,
    WarmUp,
)
from k2cli.protocol.progress_page import Phase
from k2cli.rank.array_bytes import array_digest
from k2cli.rank.attention.latent import evaluates_blocks
from k2cli.rank.exchange import Exchange
from k2cli.rank.kv_cache.block_store import BlockStore
from k2cli.rank.kv_cache.kept_prefixes import LayerCaches
from k2cli.rank.kv_cache.table import CacheTable, make_room
from k2cli.rank.startup.early_kernels import EarlyKernels
from k2cli.rank.startup.marks import cache_digest, kept_output, mark
from k2cli.sharding.stage import Stage


class Advance(Protocol):
    """Records progress for the guard: see ``protocol.progress_page``."""

    def __call__(self, phase: Phase, *, joint: bool = False) -> None: ...


def _ignore(phase: Phase, *, joint: bool = False) -> None:
    """Record nothing."""


@dataclass(frozen=True, slots=True)
class StepResult:
    """Result of a decision on this rank.

    ``logits`` is ``[rows, vocabulary]`` after a Decode on ranks that have the head; lazy on the
    leader. With drafts it has a row for the input and one for each of them. Digests and marks are
    empty unless the decision asked for them. ``in_step``, a lazy bool, is False if the ranks' sums
    belong to different steps (see ``Exchange.in_step``).
    """

    logits: mx.array | None = None
    in_step: mx.array | None = None
    arrived_digest: str = ""
    computed_digest: str = ""
    state_digest: str = ""
    arrived_marks: Marks | None = None
    computed_marks: Marks | None = None
    cache_digest: str = ""

    @property
    def to_compute(self) -> list[mx.array]:
        """The lazy arrays, in the order in which every rank must compute them."""
        return [array for array in (self.logits, self.in_step) if array is not None]


def _wrong_data(what: str) -> ClusterError:
    return ClusterError(f"{what}: data between the ranks arrived wrong", hint="k2 doctor")


class Executor:
    """One rank's model part and all its caches."""

    def __init__(
        self,
        stage: Stage,
        group: Any | None,
        advance: Advance = _ignore,
        *,
        meets: bool = False,
    ) -> None:
        """Call ``advance`` after each layer, and before and after each wait for a peer.

        ``meets``: tensor ranks wait for each other before some steps (``Assignment.meets``).
        """
        self.stage = stage
        self.caches = CacheTable(stage)
        self.store: BlockStore | None = None
        self._advance = advance
        self.exchange = Exchange(stage, group)
        self._meets = meets and self.exchange.sums
        self._early_kernels = EarlyKernels(stage, self._evaluate, sums=self.exchange.sums)
        self._seen_shapes: set[tuple[object, ...]] = set()
        self._last_was_new = False
        self.phase: Phase = "busy"
        """The phase of the step that was last started."""
        self.vocabulary = 0
        """Scores that the model gives for each token; known after the self-test."""
        # Time spent waiting for other ranks' hidden states, since the start.
        self.waited_seconds = 0.0
        self._on_gpu = mx.default_device() == mx.gpu
        self._arrived_inputs: dict[int, int] = {}
        """On a pipeline's first stage: the last token of each sequence that came ahead of its
        decision."""
        # Then a chunk is computed while it is built, and must not wait for other ranks there.
        self._computes_early = evaluates_blocks(stage.model, self.about_to_wait)

    @property
    def is_pipeline(self) -> bool:
        """True if hidden states go from rank to rank."""
        return self.exchange.is_pipeline

    def carry_out(self, decision: Decision, chosen: mx.array | None = None) -> StepResult:
        """Carry out one decision of the leader.

        Args:
            chosen: the inputs of a Decode that was decided ahead, on the leader: uint32 ``[rows]``,
                lazy.
        """
        match decision:
            case Decode():
                return self._decode(decision, chosen)
            case Prefill(sequence=sequence, tokens=tokens):
                self.caches.feed(sequence, tokens)
                chunk = mx.array([tokens], dtype=mx.int32)
                caches = self.caches.sequences[sequence]
                if decision.marks:
                    return self._marked_prefill(chunk, caches)
                self._prefill(chunk, caches)
            case PrefillTogether():
                self._prefill_together(decision)
            case OpenSequence(sequence=sequence, prefix=prefix, kept_tokens=kept_tokens):
                self.caches.open(sequence, prefix, kept_tokens, decision.release)
            case CloseSequence():
                self.caches.close(decision.sequence, decision)
            case JoinBatch(batch=batch, sequence=sequence):
                self.caches.join(batch, sequence)
            case CutBack(batch=batch, tokens=count):
                self.caches.cut_back(batch, count)
            case LeaveBatch():
                if decision.told >= 0:
                    self._feed(decision.sequence, decision.told)
                self._arrived_inputs.pop(decision.sequence, None)
                self.caches.leave(decision.batch, decision.sequence, decision, decision.move_to)
            case SplitPrefix(prefix=prefix, above=above, tokens=tokens):
                self.caches.prefixes.split(prefix, above, tokens)
            case DropPrefix(prefix=prefix):
                self.caches.prefixes.drop(prefix)
            case OpenStore() | StoreBlock() | ReadBlocks() | AdoptBlocks() | ForgetBlocks():
                self._use_store(decision)
            case WarmUp():
                self._early_kernels.begin()
            case Warm():
                self._early_kernels.end()
            case Tick() | Quit():
                pass
        return StepResult()

    def _use_store(
        self, decision: OpenStore | StoreBlock | ReadBlocks | AdoptBlocks | ForgetBlocks
    ) -> None:
        store, kept = self.store, self.caches.prefixes
        assert store is not None
        match decision:
            case OpenStore():
                store.open(decision)
            case StoreBlock(prefix=prefix, first=first, block=block):
                store.write(block, kept.segments(prefix, first, first + BLOCK_TOKENS))
            case ReadBlocks():
                store.read(decision)
            case AdoptBlocks(keep_as=prefix, keep_below=below, tokens=tokens):
                blocks = store.take(decision.reading, decision.count)
                if prefix is not None:
                    kept.adopt(prefix, tokens, blocks, below, decision.skip)
            case ForgetBlocks():
                store.forget(decision)

    def about_to_wait(self) -> None:
        """Record that this rank will wait for the result of a step, perhaps for other ranks."""
        self._advance(self.phase, joint=self.exchange.sums)

    def about_to_wait_for_messages(self) -> None:
        """Record that this rank will wait for messages of other ranks."""
        self._advance("waiting")

    def _begin(self, *shape: object) -> None:
        """Record the start of a step, and its shape: kernels may be compiled for a new one.

        A step may be computed while the next one is begun, so one more counts as new.
        """
        new = shape not in self._seen_shapes
        self._seen_shapes.add(shape)
        self.phase = "computing a new shape" if new or self._last_was_new else "busy"
        self._last_was_new = new
        self._advance(self.phase)

    def _marked_prefill(self, tokens: mx.array, caches: LayerCaches) -> StepResult:
        """Compute a chunk, and mark the hidden states that arrived and that left the last layer."""
        layer = self.stage.last_layer if self.stage.is_last else None
        if layer is None:
            arrived, computed = self._prefill(tokens, caches)
            hidden = None if self.stage.is_last else computed
        else:
            with kept_output(layer) as kept:
                arrived, _ = self._prefill(tokens, caches)
            hidden = kept[0] if kept else None
        if hidden is not None:
            self.about_to_wait()
            mx.eval(hidden)  # on every rank, since the sums of the last layer are part of it
        self._advance(self.phase)
        return StepResult(
            arrived_marks=None if arrived is None else mark(arrived),
            computed_marks=None if hidden is None else mark(hidden),
        )

    def _prefill(self, tokens: mx.array, caches: LayerCaches) -> tuple[mx.array | None, mx.array]:
        """Compute a chunk; return the hidden states that arrived, and the output, still lazy."""
        rows, length = tokens.shape
        self._begin("prefill", rows, length.bit_length())
        arrived, output = self._compute(tokens, caches, with_output=not self.stage.is_last)
        self._evaluate(caches)
        if not self.stage.is_last:
            self._send(output)
        return arrived, output

    def _compute(
        self, tokens: mx.array, caches: LayerCaches, *, with_output: bool
    ) -> tuple[mx.array | None, mx.array]:
        """Build a step of several tokens of each row, and wait for what it needs of other ranks.

        ``with_output`` says that its output will be computed, and not its caches alone.

        Returns:
            The hidden states that arrived, and the output, still lazy.
        """
        arrived = self._receive(tokens, caches, with_output=with_output)
        if self._computes_early:
            self._wait_for(arrived)
        output = self.stage.forward(tokens, self.stage.complete(caches), arrived)
        if not self._computes_early:
            self._wait_for(arrived)
        return arrived, output

    def _receive(
        self, tokens: mx.array, caches: LayerCaches, *, with_output: bool
    ) -> mx.array | None:
        """Receive the hidden states of a begun step, lazily; compile a new shape's kernels before.

        Its caches get room for it.
        """
        rows, length = tokens.shape
        make_room(caches, length)
        if self._last_was_new:  # this step's shape
            self._early_kernels.compile_for(tokens, caches, with_output=with_output)
        if self._meets and (length > 1 or self._last_was_new):
            self._advance("waiting")
            self.exchange.meet()
            self._advance(self.phase)
        return self.exchange.receive(rows, length)

    def _evaluate(self, caches: LayerCaches) -> None:
        """Compute layer by layer: it limits memory, and the guard sees progress after each."""
        for entry in caches:
            self.about_to_wait()
            mx.eval(entry.state)
            if self._on_gpu:
                mx.synchronize()  # a GPU frees a layer's memory only some time after it
        self._advance(self.phase)

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
                    self._feed(sequence, token)
        if step.drafts:
            return self._verify(step)
        inputs = (
            self.exchange.inputs_ahead(len(batch.rows), chosen)
            if step.ahead
            else mx.array(step.tokens, dtype=mx.int32)
        )
        self._begin("decode", len(batch.rows), step.ahead)
        column = inputs[:, None]
        arrived = self._receive(column, batch.caches, with_output=True)
        output = self.stage.forward(column, self.stage.complete(batch.caches), arrived)
        if step.ahead and self.is_pipeline and self.stage.is_first:
            self._wait_for(inputs)
            self._check_arrived(batch.rows, cast("list[int]", inputs.tolist()))
        else:
            self._wait_for(arrived)
        computed = output[:, -1] if self.stage.is_last else output
        if self.stage.is_last:
            self.vocabulary = computed.shape[-1]
        if not self.stage.is_last:
            self._send(computed)
        if step.digest:
            self.about_to_wait()
        digest_of = mx.argmax(computed, axis=-1) if self.stage.is_last else computed
        return StepResult(
            logits=computed if self.stage.is_last else None,
            in_step=self.exchange.in_step(step.step, computed) if step.state_digest else None,
            arrived_digest="" if arrived is None or not step.digest else array_digest(arrived),
            computed_digest=array_digest(digest_of) if step.digest else "",
            state_digest=self.caches.digest(step.step) if step.state_digest else "",
            arrived_marks=mark(arrived) if arrived is not None and step.marks else None,
            computed_marks=mark(computed) if step.marks else None,
            cache_digest=cache_digest(batch.caches) if step.marks else "",
        )

    def _verify(self, step: Decode) -> StepResult:
        """Compute the input of a batch's only row and the drafted tokens after it."""
        batch = self.caches.batches[step.batch]
        (sequence,) = batch.rows
        tokens = [*step.tokens, *step.drafts]
        self.caches.feed(sequence, step.drafts)
        self._begin("verify", len(tokens))
        _, output = self._compute(
            mx.array([tokens], dtype=mx.int32), batch.caches, with_output=True
        )
        if self._on_gpu:
            # As a chunk of a prompt is, so that the plan's memory for those is enough.
            self._evaluate(batch.caches)
        if not self.stage.is_last:
            self._send(output)
        return StepResult(
            logits=output[0] if self.stage.is_last else None,
            in_step=self.exchange.in_step(step.step, output) if step.state_digest else None,
            state_digest=self.caches.digest(step.step) if step.state_digest else "",
        )

    def _check_arrived(self, rows: list[int], tokens: list[int]) -> None:
        """Note tokens that came ahead of their decision, for ``_feed``.

        Raises:
            ClusterError: if the model has no such token. A GPU would read memory that is not the
                embedding's.
        """
        known = getattr(getattr(self.stage.model, "args", None), "vocab_size", None)
        for sequence, token in zip(rows, tokens, strict=True):
            if known is not None and token >= known:
                raise _wrong_data(f"token {token} arrived from rank 0; the model has {known}")
            self._arrived_inputs[sequence] = token

    def _feed(self, sequence: int, token: int) -> None:
        """Record the input of a step. One that came ahead of its decision must be the same.

        Raises:
            ClusterError: if the step was computed with another token. This rank would go on with
                a KV cache that does not belong to the text.
        """
        arrived = self._arrived_inputs.pop(sequence, token)
        if arrived != token:
            raise _wrong_data(f"token {token} arrived as {arrived} from rank 0")
        self.caches.feed(sequence, [token])

    def _wait_for(self, arrived: mx.array | None) -> None:
        """Wait for another rank's array after the work that uses it has been built.

        Waiting here, and not inside that work, keeps the GPU from waiting for the network.
        """
        if arrived is not None:
            self._advance("waiting")
            since = time.monotonic()
            mx.eval(arrived)
            self.waited_seconds += time.monotonic() - since
            self._advance(self.phase)

    def _send(self, output: mx.array) -> None:
        """Compute hidden states ``[rows, length, width]`` and start sending them."""
        mx.eval(output)
        self._advance(self.phase)
        self.exchange.send(output)
