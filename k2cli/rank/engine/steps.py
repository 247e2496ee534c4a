"""Steps in flight: decisions that were sent, and are or will be carried out on the leader.

A run of one rank, and tensor parallelism, carry a decision out as it is sent; the tokens that a
decode step chooses stay lazy until they are read. In a pipeline the leader is the last stage, so
its own part of a decision is deferred until the earlier stages have done theirs: several decisions
can be in flight, and every stage has work.

A decode step may be decided *ahead*, while the step that chooses its inputs is still being
computed: the chosen tokens go to the other ranks through the MLX group, without passing through
this program, and every rank builds the next step meanwhile.

If a choice depends on earlier tokens (penalties, masks of grammars), it is *deferred*: the step is
carried out as early as any other, and its tokens are chosen when those before are known, while the
device computes it.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import mlx.core as mx

from k2cli.protocol import Decision, Decode, Prefill, PrefillTogether
from k2cli.rank.control import Followers
from k2cli.rank.engine.choice import choose_after_drafts, choose_tokens
from k2cli.rank.engine.lookahead import CopyWatch, device_limit_bytes
from k2cli.rank.engine.requests import Running
from k2cli.rank.executor import Executor, StepResult


@dataclass(slots=True)
class Step:
    """A decision, the requests that it computes, and its result.

    ``chosen`` and ``logits`` are set when its tokens are chosen: the tokens, and the logits of
    those that could be. ``seconds`` is the time that the leader took to carry it out, or to build
    it if it is a decode step. It includes ``waited_seconds``, spent waiting for another rank's
    part.
    """

    decision: Decision
    rows: list[Running] = field(default_factory=list)
    result: StepResult | None = None
    chosen: mx.array | None = None
    logits: mx.array | None = None
    seconds: float = 0.0
    waited_seconds: float = 0.0

    @property
    def computes(self) -> bool:
        """True if the stages compute something for it."""
        return isinstance(self.decision, Prefill | PrefillTogether | Decode)

    @property
    def drafts(self) -> list[int]:
        """The drafted tokens that it verifies."""
        return self.decision.drafts if isinstance(self.decision, Decode) else []


class StepQueue:
    """Decisions in flight: sent to followers, and carried out on the leader in the same order."""

    def __init__(self, executor: Executor, followers: Followers) -> None:
        self._executor = executor
        self._followers = followers
        self._deferred = executor.is_pipeline
        self._watch = CopyWatch(device_limit_bytes())
        self._steps: deque[Step] = deque()
        self._number = 0

    @property
    def next_number(self) -> int:
        """Number of the next decision."""
        return self._number + 1

    @property
    def computing(self) -> int:
        """Number of computing steps that have not been completed."""
        return sum(step.computes for step in self._steps)

    def decodes_of(self, batch: int) -> list[Step]:
        """Return the decode steps of a batch that have not been completed, oldest first."""
        return [
            step
            for step in self._steps
            if isinstance(step.decision, Decode) and step.decision.batch == batch
        ]

    def may_look_ahead(self, batch: int) -> bool:
        """True if a batch's next decode step may be built while this one is being computed."""
        if not self._watch.watches:
            return True
        return self._watch.allows(self._executor.caches.batch_bytes(batch), mx.get_active_memory())

    def submit(
        self, decision: Decision, rows: Sequence[Running] = (), chosen: mx.array | None = None
    ) -> None:
        """Send a decision, and carry it out on the leader unless that is deferred.

        Raises:
            ConnectionLost: if a follower is gone.
        """
        self._number += 1
        self._followers.send(decision)
        step = Step(decision, list(rows))
        if not self._deferred:
            self._carry_out(step, chosen)
            if not step.computes:
                return
        elif chosen is not None:
            self._executor.exchange.feed_ahead(chosen)
        self._steps.append(step)

    def build_next(self) -> Step | None:
        """Carry out the oldest computing step, and all decisions before it.

        The step stays in flight until ``complete`` is called.
        """
        while self._steps:
            step = self._steps[0]
            if step.result is None:
                self._carry_out(step, None)
            if step.computes:
                return step
            self._steps.popleft()
        return None

    def choose(self, step: Step) -> None:
        """Choose the tokens of a carried out decode step whose rows need their history.

        All earlier steps of these rows must have been completed, and the masks have come.
        """
        assert step.result is not None
        assert step.result.logits is not None
        step.logits, step.chosen = choose_tokens(step.rows, step.result.logits)
        mx.async_eval(step.chosen)  # type: ignore[no-untyped-call]

    def complete(self) -> None:
        """Remove the oldest computing step, whose result has been read, from those in flight."""
        self._steps.popleft()

    def now(self, decision: Decision) -> StepResult:
        """Send a decision and carry it out on the leader at once; nothing may be in flight."""
        assert not self._steps
        self._number += 1
        self._followers.send(decision)
        result = self._executor.carry_out(decision)
        if result.to_compute:
            self._executor.about_to_wait()
            mx.eval(*result.to_compute)
        return result

    def _carry_out(self, step: Step, chosen: mx.array | None) -> None:
        started, waited = time.monotonic(), self._executor.waited_seconds
        before_bytes = mx.get_active_memory()
        step.result = self._executor.carry_out(step.decision, chosen)
        step.seconds = time.monotonic() - started
        step.waited_seconds = self._executor.waited_seconds - waited
        # Evaluate the logits too: even if no token is read, every rank must run every sum.
        if step.result.logits is not None and step.rows:
            if step.drafts:
                step.logits = step.result.logits
                step.chosen = choose_after_drafts(step.rows[0], step.logits)
                mx.async_eval(step.chosen, *step.result.to_compute)  # type: ignore[no-untyped-call]
            elif any(row.needs_history for row in step.rows):
                mx.async_eval(*step.result.to_compute)  # type: ignore[no-untyped-call]
            else:
                step.logits, step.chosen = choose_tokens(step.rows, step.result.logits)
                mx.async_eval(step.chosen, *step.result.to_compute)  # type: ignore[no-untyped-call]
        if self._watch.watches and isinstance(step.decision, Decode) and step.decision.ahead:
            cache_bytes = self._executor.caches.batch_bytes(step.decision.batch)
            self._watch.observe(cache_bytes, mx.get_active_memory() - before_bytes)
