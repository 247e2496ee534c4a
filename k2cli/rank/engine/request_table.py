"""The leader's table of requests: waiting, in prefill, or decoding in a batch.

It moves requests from one of these to the next, ends them, balances batches, and drops kept
prefixes that leave no room for them; ``admission`` starts those that wait. Each change is a
decision, which the ``Sender`` sends to all ranks in order.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection

from k2cli.fair_queue import Ticket
from k2cli.protocol import (
    CloseSequence,
    CutBack,
    FinishReason,
    Generate,
    JoinBatch,
    KvCacheUse,
    LeaveBatch,
    OpenSequence,
    RankMessage,
    RequestFailed,
)
from k2cli.rank.engine.budget import (
    MAX_BATCH_ROWS,
    Budget,
    used_tokens,
    worst_case_tokens,
)
from k2cli.rank.engine.masks import MaskedAnswer, Masks, Problem
from k2cli.rank.engine.prefixes.block_reading import BlockReading
from k2cli.rank.engine.prefixes.keeper import Keep, PrefixKeeper, Sender
from k2cli.rank.engine.requests import Running, Waiting
from k2cli.rank.engine.waiting_line import WaitingLine

MAX_WAITING = 256
"""Requests of one key that wait; the connections of the guard bound those of all keys."""


class RequestTable:
    """Requests by their state, and the prefixes that are kept for later requests."""

    def __init__(
        self,
        sender: Sender,
        tell: Callable[[RankMessage], None],
        *,
        context_length: int,
        concurrency: int,
        batches: int,
        can_batch: bool,
        cuttable_caches: bool,
        masks: Masks | None = None,
    ) -> None:
        """Make a table of ``batches`` side by side, each of one request unless ``can_batch``.

        If it can batch, there is one more batch, for short requests that find no place in the
        others: a row there takes the memory of a short request, not that of the longest row.
        Without ``masks``, requests with grammars are refused.
        """
        self.sender = sender
        self.tell = tell
        self._masks = masks
        self._context_length = context_length
        self.budget = Budget(
            tokens=worst_case_tokens(context_length, 0, context_length) * concurrency,
            batches=batches if can_batch else max(batches, concurrency),
            rows_per_batch=MAX_BATCH_ROWS if can_batch else 1,
        )
        self.keeper = PrefixKeeper(sender, whole_only=not cuttable_caches)
        self._prefixes = self.keeper.tree
        self._reported_use: KvCacheUse | None = None
        self.line = WaitingLine(self._prefixes)
        self.guest_batch = self.budget.batches if can_batch else None
        self.prefilling: list[Running] = []
        self.batches: dict[int, list[Running]] = {
            b: [] for b in range(self.budget.batches + can_batch)
        }

    @property
    def empty(self) -> bool:
        """True if no request waits or runs."""
        return not (self.line or self.prefilling or any(self.batches.values()))

    @property
    def admitted(self) -> list[Running]:
        """The requests that run: in prefill, or in a batch."""
        return [*self.prefilling, *(row for rows in self.batches.values() for row in rows)]

    def enqueue(self, request: Generate) -> None:
        """Queue a request, or refuse it with the numbers."""
        worst = self.worst_case(request)
        if not request.prompt or len(request.prompt) >= self._context_length:
            error = (
                f"the prompt has {len(request.prompt)} tokens, "
                f"the context holds {self._context_length}"
            )
            self.tell(RequestFailed(request.request_id, error, "invalid"))
        elif worst > self.budget.tokens:
            error = f"the request may need {worst} tokens, the plan holds {self.budget.tokens}"
            self.tell(RequestFailed(request.request_id, error, "capacity"))
        elif (waiting := self.line.count_of(request.owner)) >= MAX_WAITING:
            error = f"{waiting} requests are waiting, the queue holds {MAX_WAITING}"
            self.tell(RequestFailed(request.request_id, error, "capacity"))
        elif request.grammar is not None and self._masks is None:
            error = "this run cannot make answers obey grammars"
            self.tell(RequestFailed(request.request_id, error, "internal"))
        else:
            masked = None
            if request.grammar is not None and self._masks is not None:
                masked = self._masks.open(request.grammar, request.stop_tokens)
            self.line.join(Waiting(request, time.monotonic(), masked))

    def cancel(self, request_id: str) -> None:
        """Mark a running request as cancelled, or remove it from the queue."""
        for row in self.admitted:
            if row.request.request_id == request_id:
                row.cancelled = True
                return
        ticket = self.line.find(request_id)
        if ticket is not None:
            self._end_waiting(ticket, ticket.item.ended("cancelled"))

    def _end_waiting(self, ticket: Ticket[Waiting], report: RankMessage) -> None:
        waiting = ticket.item
        self.line.leave(ticket)
        self._close(waiting.masked)
        if waiting.paused is not None:
            waiting.paused.ended = True
            self.forget_paused(waiting)
        self.tell(report)

    def _close(self, masked: MaskedAnswer | None) -> None:
        if masked is not None and self._masks is not None:
            self._masks.close(masked)

    def end_cancelled(self) -> None:
        """End all requests that were cancelled."""
        for row in [row for row in self.admitted if row.cancelled]:
            self.end(row, "cancelled")

    def end_masked(self) -> None:
        """End the requests whose grammars allow no more, or cannot be obeyed."""
        for ticket in [t for t in self.line.tickets if t.item.masked is not None]:
            waiting = ticket.item
            assert waiting.masked is not None
            problem = waiting.masked.problem
            if problem is not None:
                failed = RequestFailed(waiting.request.request_id, problem.text, problem.kind)
                self._end_waiting(ticket, failed)
            elif waiting.masked.complete:
                self._end_waiting(ticket, waiting.ended("stop"))
        for row in [row for row in self.admitted if row.masked is not None]:
            assert row.masked is not None
            if row.masked.problem is not None:
                self.fail(row)
            elif row.masked.complete:
                self.end(row, "stop")

    def read_stored(self, reading: BlockReading, tokens_per_second: float) -> None:
        """Let requests wait for their stored prefixes, and go on with reading these."""
        for ticket in self.line.tickets:
            if not ticket.item.considered:
                reading.consider(ticket.item, tokens_per_second)
        if not reading.is_reading:
            return
        kept = self._prefixes.tokens_of(self.line.wanted_prefixes())
        free = self.budget.tokens - used_tokens(self.worst_cases()) - kept
        if reading.read_some(self.line.has, free, self.evict):
            self.evict()

    def forget_paused(self, waiting: Waiting) -> None:
        """Drop what is kept of a paused request, which ends or goes on."""
        if waiting.prefix is not None and waiting.prefix in self._prefixes:
            self.keeper.drop(waiting.prefix)
        waiting.prefix = None

    def worst_case(self, request: Generate) -> int:
        """Return the tokens that a request may need at most."""
        return worst_case_tokens(len(request.prompt), request.max_tokens, self._context_length)

    # --- running requests ------------------------------------------------------------------------

    def prefill_order(self) -> list[Running]:
        """Return the requests in prefill, the one first whose next chunk is to be computed."""
        unfinished = [row for row in self.prefilling if row.prefill_left]
        return sorted(unfinished, key=self._order_of)

    def _order_of(self, row: Running) -> tuple[float, float, int]:
        """Return the order of a request, or of one of its key that waits for it and is due first.

        Of another key's it would be work that neither key is charged for in time.
        """
        own, ticket = self.line.running_order(row), row.awaited_by
        if ticket is None or ticket.owner != row.ticket.owner or not self.is_awaited(row):
            return own
        return min(own, self.line.waiting_order(ticket))

    def is_awaited(self, row: Running) -> bool:
        """True if another request waits for the prompt of this one."""
        return row.awaited_by is not None and self.line.has(row.awaited_by.item)

    def await_prompt(self, row: Running, ticket: Ticket[Waiting]) -> None:
        """Note that a request waits for the prompt of a running one."""
        earlier = row.awaited_by
        if (
            earlier is None
            or not self.line.has(earlier.item)
            or self.line.waiting_order(ticket) < self.line.waiting_order(earlier)
        ):
            row.awaited_by = ticket

    def is_drafting(self, batch: int | None) -> bool:
        """True if a batch's row has drafted tokens in flight, so that the batch must not change."""
        return batch is not None and any(row.drafted for row in self.batches[batch])

    def cut_back(self, row: Running, tokens: int) -> None:
        """Remove the last computed tokens of a row: drafts that are wrong, or not needed."""
        assert row.batch is not None
        row.drafted = 0
        row.computed -= tokens
        if tokens:
            self.sender.submit(CutBack(self.sender.next_number, row.batch, tokens))

    def join(self, row: Running) -> None:
        """Make a request whose prompt is computed a row of its batch."""
        if self.is_awaited(row):
            self._share(row)
        row.awaited_by = None
        self.prefilling.remove(row)
        assert row.batch is not None
        self.batches[row.batch].append(row)
        self.sender.submit(JoinBatch(self.sender.next_number, row.batch, row.sequence))

    def _share(self, row: Running) -> None:
        """Keep the cache of a computed prompt for requests that wait for it, if there is room."""
        tokens = row.held_tokens
        if used_tokens(self.worst_cases()) + len(tokens) > self.budget.tokens:
            return  # before others are dropped for it
        self.evict(len(tokens))
        used = used_tokens(self.worst_cases()) + self._prefixes.tokens() + len(tokens)
        if used > self.budget.tokens:
            return
        request = row.request
        keep = self.keeper.keep(tokens, request.prefix_scope, stores=request.stores_prefix)
        if keep.prefix is None:
            return
        number, kept = self.sender.next_number, (keep.prefix, keep.below, keep.first)
        self.sender.submit(CloseSequence(number, row.sequence, *kept))
        number = self.sender.next_number
        self.sender.submit(OpenSequence(number, row.sequence, keep.prefix, len(tokens)))
        self.evict()

    def balance(self, quiet: list[int]) -> None:
        """Move a request from a batch to one with fewer, so that all stages have work.

        Args:
            quiet: the batches that have no step in flight; others must not change.
        """
        expected = self.worst_cases()
        quiet = [batch for batch in quiet if batch != self.guest_batch]
        for source in quiet:
            target = min(quiet, key=lambda batch: len(expected[batch]))
            if len(self.batches[source]) < 2 or len(expected[source]) - len(expected[target]) < 2:
                continue
            row = self.batches[source][-1]
            moved = {
                **expected,
                source: expected[source][:-1],
                target: [*expected[target], row.worst_case_tokens],
            }
            if used_tokens(moved) > self.budget.tokens:
                continue  # it would be padded to longer rows
            self.batches[source].pop()
            self.batches[target].append(row)
            row.batch = target
            number = self.sender.next_number
            told = row.unannounced_input
            self.sender.submit(LeaveBatch(number, source, row.sequence, move_to=target, told=told))
            row.unannounced = False
            self.evict()
            return

    def end(self, row: Running, reason: FinishReason) -> None:
        """Report a request's end, and keep its cache as a prefix if it may be used again."""
        last = row.generated[-1] if row.generated else None
        stopped_by_token = reason == "stop" and last in row.request.stop_tokens
        completion = len(row.generated) - stopped_by_token
        self._release(row, keep=row.request.use_prefix_cache)
        self.tell(row.finished(reason, completion))

    def fail(self, row: Running) -> None:
        """Report a request whose sampling failed, or whose grammar cannot be obeyed."""
        self._release(row, keep=False)
        problem = row.masked.problem if row.masked is not None else None
        if problem is None or row.failure is not None:
            problem = Problem(f"sampling failed: {row.failure}", "internal")
        self.tell(RequestFailed(row.request.request_id, problem.text, problem.kind))

    def _release(self, row: Running, *, keep: bool) -> None:
        row.ended = True
        self._close(row.masked)
        self.cut_back(row, row.drafted)
        tokens, scope = row.held_tokens, row.request.prefix_scope
        stores = row.request.stores_prefix
        self.leave(row, self.keeper.keep(tokens, scope, stores=stores) if keep else Keep())
        self.line.end(row)
        self.evict()

    def leave(self, row: Running, keep: Keep) -> None:
        """Take a request from its batch, or from those in prefill, and keep its cache or not."""
        assert row.batch is not None
        number, kept = self.sender.next_number, (keep.prefix, keep.below, keep.first)
        if row in self.prefilling:
            self.prefilling.remove(row)
            self.sender.submit(CloseSequence(number, row.sequence, *kept))
            return
        self.batches[row.batch].remove(row)
        told = row.unannounced_input
        self.sender.submit(LeaveBatch(number, row.batch, row.sequence, *kept, told=told))

    def evict(self, more_tokens: int = 0) -> None:
        """Drop prefixes until the worst case of all requests fits, and so many tokens more."""
        used = used_tokens(self.worst_cases()) + more_tokens
        self.keeper.evict(used, self.budget.tokens, self.line.wanted_prefixes())
        if self._cache_use() != self._reported_use:
            self.report_cache_use()

    def report_cache_use(self) -> None:
        """Report how much of the KV cache is taken."""
        self._reported_use = self._cache_use()
        self.tell(self._reported_use)

    def _cache_use(self) -> KvCacheUse:
        return KvCacheUse(
            len(self._prefixes),
            self._prefixes.tokens(),
            used_tokens(self.worst_cases()),
            self.budget.tokens,
        )

    def worst_cases(self, without: Collection[Running] = ()) -> dict[int, list[int]]:
        """Return the worst cases per batch; a sequence in prefill counts in its future batch."""
        worst: dict[int, list[int]] = {batch: [] for batch in self.batches}
        for row in self.admitted:
            if row not in without:
                assert row.batch is not None
                worst[row.batch].append(row.worst_case_tokens)
        return worst
