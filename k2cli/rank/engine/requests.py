"""Requests in the engine: their progress, and their reports at the end."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from k2cli.fair_queue import Ticket
from k2cli.protocol import Finished, FinishReason, Generate
from k2cli.rank.engine.masks import MaskedAnswer
from k2cli.rank.engine.sampling import Sampler
from k2cli.rank.engine.speculation import RowDrafts


@dataclass(slots=True, eq=False)
class Waiting:
    """A request that has not been admitted, or was paused. ``since`` is of the monotonic clock.

    ``masked`` is set if the request has a grammar, ``paused`` if it has begun. ``prefix`` is the
    kept prefix that it will use, as far as that is known. ``considered`` is True once stored
    prefixes were looked for, ``reading`` while they are read for it. ``passed_units`` counts the
    work that was admitted before it while it was next and there was no memory for it.
    ``cached_tokens`` were found in the kept prefix, when ``found_among`` had been added to the
    tree, and ``common`` are the tokens with which the prompts of running sequences begin as its own
    does, as far as they were compared.
    """

    request: Generate
    since: float
    masked: MaskedAnswer | None = None
    paused: Running | None = None
    prefix: int | None = None
    passed_units: int = 0
    considered: bool = False
    reading: bool = False
    cached_tokens: int = 0
    found_among: int = 0
    common: dict[int, int] = field(default_factory=dict)

    @property
    def is_ready(self) -> bool:
        """False while its grammar is compiled, its next mask computed, or its prefix read."""
        return not self.reading and (self.masked is None or not self.masked.pending)

    def ended(self, reason: FinishReason) -> Finished:
        """Build the report of a request that ends while it waits."""
        if self.paused is not None:
            return self.paused.finished(reason, len(self.paused.generated))
        waited = time.monotonic() - self.since
        prompt = len(self.request.prompt)
        return Finished(self.request.request_id, reason, prompt, 0, 0, waited, 0.0, 0.0)


@dataclass(slots=True, eq=False)
class Running:
    """A request that was admitted: a sequence of its own in prefill, and then a row of ``batch``.

    ``ticket`` is its place in the fair queue. ``units`` is the work that was done for it since it
    started, or since it went on after it was last ``paused_at``, without what was done again:
    ``reached`` counts the tokens that have been computed at least once. ``prefill_target`` counts
    the tokens to compute before the next decode step, whose input is the one after them.
    ``computed`` counts the tokens whose keys and values the ranks hold, or will hold once every
    step that was decided is carried out. ``steps`` counts the decode steps that were decided.
    ``awaited_by`` is the first request that waits for its prompt, or has waited for it.
    ``unannounced`` is True if the last of them was decided ahead, and no decision has named its
    input yet. ``drafted`` counts the drafted tokens of the step in flight, which ``computed``
    includes. Times are of the monotonic clock.
    """

    request: Generate
    sequence: int
    ticket: Ticket[Waiting]
    sampler: Sampler
    worst_case_tokens: int
    queued_at: float
    started_at: float
    masked: MaskedAnswer | None = None
    is_short: bool = False
    prefill_target: int = 0
    cached: int = 0
    computed: int = 0
    reached: int = 0
    reported: int = 0
    units: int = 0
    pauses: int = 0
    paused_at: float = 0.0
    paused_seconds: float = 0.0
    steps: int = 0
    awaited_by: Ticket[Waiting] | None = None
    unannounced: bool = False
    generated: list[int] = field(default_factory=list)
    batch: int | None = None
    first_token_at: float | None = None
    cancelled: bool = False
    ended: bool = False
    failure: Exception | None = None
    speculation: RowDrafts | None = None
    drafted: int = 0
    draft_tokens: int = 0
    accepted_tokens: int = 0

    @property
    def prefill_left(self) -> int:
        """Tokens to compute before the next decode step, whose input is the last known one."""
        return max(0, self.prefill_target - self.computed)

    @property
    def needs_history(self) -> bool:
        """True if its next choice depends on earlier tokens, so that they must be known."""
        return not self.ended and (self.masked is not None or self.sampler.needs_history)

    @property
    def mask(self) -> bytes | None:
        """The tokens that its grammar allows next, once they have come; None without a grammar."""
        return None if self.masked is None else self.masked.mask

    @property
    def wants_steps(self) -> bool:
        """True if the request needs another decode step."""
        return not self.ended and self.steps < self.request.max_tokens

    @property
    def may_speculate(self) -> bool:
        """True if its next step may verify a draft.

        Penalties and masks are those of one position; the tokens before it would have to be chosen
        first.
        """
        return self.request.use_speculation and not self.needs_history

    @property
    def next_input(self) -> int:
        """Input token of the next decode step; the previous step must have been completed."""
        return self.generated[-1] if self.generated else self.request.prompt[-1]

    @property
    def unannounced_input(self) -> int:
        """Input of a step decided ahead that followers have not been told yet; -1 if none."""
        position = self.computed - 1 - len(self.request.prompt)
        if not self.unannounced or position >= len(self.generated):
            return -1
        return self.generated[position]

    @property
    def held_tokens(self) -> list[int]:
        """The tokens whose keys and values the ranks hold."""
        return self.known_tokens[: self.computed]

    @property
    def known_tokens(self) -> list[int]:
        """The tokens of the prompt and of the answer so far."""
        return [*self.request.prompt, *self.generated]

    def finished(self, reason: FinishReason, completion_tokens: int) -> Finished:
        """Build the report at the request's end."""
        now = time.monotonic()
        first = self.first_token_at or now
        return Finished(
            self.request.request_id,
            reason,
            prompt_tokens=len(self.request.prompt),
            completion_tokens=completion_tokens,
            cached_tokens=self.cached,
            queue_seconds=self.started_at - self.queued_at,
            prefill_seconds=first - self.started_at,
            decode_seconds=now - first,
            pauses=self.pauses,
            paused_seconds=self.paused_seconds,
            draft_tokens=self.draft_tokens,
            accepted_tokens=self.accepted_tokens,
        )
