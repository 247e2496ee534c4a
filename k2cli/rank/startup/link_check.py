"""The link check before a run is ready: a long prompt that all ranks compute twice.

Over JACCL long prompts have given wrong text without any error (ml-explore/mlx#4342, mlx#3149,
exo-explore/exo#2208, exo#2270). The self-test is too short to see that. So a prompt of several
chunks, as large as those of requests, is computed twice:

* in a pipeline, the hidden states of each chunk must arrive at a rank as the one before sent them;
* in tensor parallelism, the hidden state after the last layer must be equal on all ranks: it is the
  sum of what all ranks contributed to each layer;
* and what each rank computed, and its KV caches, must be the same in both runs.

On a CPU all of this must be equal to the bit. On a GPU the second and third may differ by rounding,
up to a bound; what a pipeline sends must arrive as it was in any case.
"""

from __future__ import annotations

import queue
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import mlx.core as mx

from k2cli.errors import ClusterError
from k2cli.pauses import Deadline
from k2cli.protocol import (
    Assignment,
    Decision,
    Decode,
    JoinBatch,
    LeaveBatch,
    LinkCheck,
    OpenSequence,
    Prefill,
    StepDigest,
    WarmUp,
)
from k2cli.rank.control import Followers
from k2cli.rank.engine.engine import Engine
from k2cli.rank.executor import StepResult
from k2cli.rank.startup.marks import first_difference

Report = Callable[[str, int, int], None]

GPU_BOUND = 0.25
"""Relative difference that rounding may make on a GPU. Wrong data differs by about 1; one expert of
eight chosen otherwise, because of a tie in its router, by a tenth."""

_CPU_CHUNK_TOKENS = 256
"""A CPU takes seconds for them, and the time limit applies between chunks."""

_RUNS = ("first", "second")
_SEQUENCE = 0
_BATCH = 0


def spread_prompt(tokens: int, seed: int, vocabulary: int) -> list[int]:
    """Return different tokens, so that the experts of a model are used as by real text."""
    return [(seed + index * 7919 + 1) % vocabulary for index in range(tokens)]


def chunk_tokens(assignment: Assignment, *, on_gpu: bool) -> int:
    """Return the size of the chunks of the link check: on a GPU the largest of requests."""
    most = assignment.prefill_chunk_tokens
    return most if on_gpu else min(most, _CPU_CHUNK_TOKENS)


@dataclass(slots=True)
class _Seen:
    """The reports of all ranks about one step; ``chunk`` None is the token after the prompt."""

    ranks: dict[int, StepDigest]
    first_position: int
    chunk: int | None


@dataclass(slots=True)
class LinkChecker:
    """The link check of one run, on the leader.

    ``vocabulary`` is the number of tokens that the model has scores for, ``timeout_seconds`` the
    time for a follower's answer.
    """

    engine: Engine
    followers: Followers
    assignment: Assignment
    report: Report
    vocabulary: int
    timeout_seconds: float
    on_gpu: bool = field(default_factory=lambda: mx.default_device() == mx.gpu)
    _answers: defaultdict[int, dict[int, StepDigest]] = field(
        default_factory=lambda: defaultdict(dict)
    )

    def check(self, wanted: LinkCheck) -> int:
        """Compute each prompt twice; return the number of tokens of the longest.

        Raises:
            ClusterError: if data differ, naming ranks, chunk, position and transport.
        """
        longest = 0
        room = self.assignment.context_length - 1
        for tokens in sorted({min(tokens, room) for tokens in wanted.tokens}):
            if tokens > 0:
                longest = self._check_length(tokens, wanted.seconds)
        return longest

    def _check_length(self, tokens: int, seconds: float) -> int:
        chunks = _chunks(tokens, chunk_tokens(self.assignment, on_gpu=self.on_gpu))
        prompt = spread_prompt(tokens, tokens, self.vocabulary)
        limit = time.monotonic() + seconds / len(_RUNS) if seconds else None
        first = self._run(0, prompt, chunks, limit)
        done = len(first) - 1  # the last step is a token of an answer
        second = self._run(1, prompt, chunks[:done], None)
        for one, other in zip(first, second, strict=True):
            self._compare_runs(one, other, chunks[:done])
        return sum(chunks[:done])

    def _run(
        self, run: int, prompt: list[int], chunks: list[int], limit: float | None
    ) -> list[_Seen]:
        """Compute a prompt and a token once, and compare the ranks; stop at the time limit."""
        engine = self.engine
        engine.now(OpenSequence(engine.next_number, _SEQUENCE))
        seen: list[_Seen] = []
        first = 0
        for decision, result in engine.in_order(self._prefills(run, prompt, chunks, limit)):
            seen.append(self._seen(decision, result, first, len(seen)))
            first += chunks[len(seen) - 1]
            self._compare_ranks(seen[-1], run, chunks)
        engine.now(JoinBatch(engine.next_number, _BATCH, _SEQUENCE))
        token = prompt[first % len(prompt)]
        decision = Decode(engine.next_number, _BATCH, [token], digest=True, marks=True)
        result = engine.now(decision)
        seen.append(self._seen(decision, result, first, None))
        self._compare_ranks(seen[-1], run, chunks)
        engine.now(LeaveBatch(engine.next_number, _BATCH, _SEQUENCE))
        return seen

    def _prefills(
        self, run: int, prompt: list[int], chunks: list[int], limit: float | None
    ) -> Iterator[Decision]:
        first = 0
        for number, tokens in enumerate(chunks, start=1):
            if first and limit is not None and time.monotonic() > limit:
                return
            text = f"link check, {_RUNS[run]} run of {len(prompt):,} tokens, chunk"
            text += f" {number} of {len(chunks)}"
            self.report(text, 1, 0)
            yield WarmUp(self.engine.next_number, text, 1)
            chunk = prompt[first : first + tokens]
            yield Prefill(self.engine.next_number, _SEQUENCE, chunk, marks=True)
            first += tokens

    def _seen(self, decision: Decision, result: StepResult, first: int, chunk: int | None) -> _Seen:
        own = StepDigest(
            0,
            decision.step,
            result.arrived_digest,
            result.computed_digest,
            arrived_marks=result.arrived_marks,
            computed_marks=result.computed_marks,
            caches=result.cache_digest,
        )
        return _Seen({0: own} | self._collect(decision.step), first, chunk)

    def _collect(self, step: int) -> dict[int, StepDigest]:
        """Wait for the followers' answers to a step; keep those to later ones."""
        self.engine.wait_for_answers()
        limit = Deadline(self.timeout_seconds)
        others = range(1, self.assignment.size)
        while missing := [rank for rank in others if rank not in self._answers[step]]:
            try:
                message = self.followers.inbox.get(timeout=limit.next_wait())
            except queue.Empty:
                if limit.has_passed:
                    raise ClusterError(f"rank {missing} did not answer the link check") from None
                continue
            if isinstance(message, StepDigest):
                self._answers[message.step][message.rank] = message
        return self._answers.pop(step)

    # --- comparing -------------------------------------------------------------------------------

    @property
    def _bound(self) -> float:
        return GPU_BOUND if self.on_gpu else 0.0

    def _compare_ranks(self, seen: _Seen, run: int, chunks: list[int]) -> None:
        """Compare what the ranks have of one step; the leader of a pipeline is its last stage."""
        pipeline = self.assignment.strategy == "pipeline"
        for rank in range(1, self.assignment.size):
            theirs = seen.ranks[rank].computed_marks
            ours = seen.ranks[rank - 1].arrived_marks if pipeline else seen.ranks[0].computed_marks
            if theirs is None or ours is None:
                continue  # a model without a list of layers: only its logits are compared
            found = first_difference(theirs, ours, 0.0 if pipeline else self._bound)
            if found is None:
                continue
            if pipeline:
                what = f"{self._name(rank - 1)} received other data than {self._name(rank)} sent"
            else:
                what = f"{self._name(rank)} has other sums than {self._name(0)}"
            raise self._wrong(what, seen, chunks, *found, run)

    def _compare_runs(self, one: _Seen, other: _Seen, chunks: list[int]) -> None:
        """Compare two runs of one step, in the order in which data pass the ranks."""
        for rank in sorted(one.ranks, reverse=True):
            before, after = one.ranks[rank], other.ranks[rank]
            name = self._name(rank)
            pairs = ((before.arrived_marks, after.arrived_marks, "received"),
                     (before.computed_marks, after.computed_marks, "computed"))  # fmt: skip
            for first, second, done in pairs:
                if first is None or second is None:
                    continue
                found = first_difference(first, second, self._bound)
                if found is not None:
                    what = f"{name} {done} other data in the second run than in the first"
                    raise self._wrong(what, one, chunks, *found)
            if before.caches != after.caches and not self._bound:
                what = f"the KV caches of {name} differ between two runs"
                raise self._wrong(what, one, chunks, 0, 0.0)

    def _name(self, rank: int) -> str:
        return f"rank {rank} on {self.assignment.nodes[rank]}"

    def _wrong(
        self,
        what: str,
        seen: _Seen,
        chunks: list[int],
        position: int,
        difference: float,
        run: int | None = None,
    ) -> ClusterError:
        transport = self.assignment.transport
        place = f"position {seen.first_position + position:,}"
        if seen.chunk is not None:
            place = f"chunk {seen.chunk + 1} of {len(chunks)}, {place}"
        else:
            place = f"the token after the prompt, {place}"
        size = f", relative difference {difference:.2g}" if 0 < difference < float("inf") else ""
        which = f", {_RUNS[run]} run" if run is not None else ""
        other = "--backend ring" if transport != "ring" else "another cable or --parallel pipeline"
        return ClusterError(
            f"link check failed over {transport} with a prompt of {sum(chunks):,} tokens: {what} "
            f"({place}{which}{size})",
            f"try {other}; k2 doctor --deep finds the length from which data are wrong",
        )


def _chunks(tokens: int, largest: int) -> list[int]:
    whole, rest = divmod(tokens, largest)
    return [largest] * whole + ([rest] if rest else [])
