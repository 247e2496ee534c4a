"""The leader's table of requests: waiting, in prefill, or decoding in a batch.

It admits requests in fair order and by memory, pauses some for others and balances batches. Each
change is a decision, which the ``Sender`` sends to all ranks in order.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence

from k2cli.fair_queue import MOST_UNITS, SHORT_UNITS, Ticket, request_units
from k2cli.protocol import (
    CloseSequence,
    CutBack,
    FinishReason,
    Generate,
    JoinBatch,
    KvCacheUse,
    LeaveBatch,
    OpenSequence,
    Paused,
    PromptProgress,
    RankMessage,
    RequestFailed,
)
from k2cli.rank.engine.budget import (
    MAX_BATCH_ROWS,
    Budget,
    batches_with_room,
    used_tokens,
    worst_case_tokens,
)
from k2cli.rank.engine.masks import MaskedAnswer, Masks, Problem
from k2cli.rank.engine.pausing import Claim, Room, choose_paused
from k2cli.rank.engine.prefixes.block_reading import BlockReading
from k2cli.rank.engine.prefixes.keeper import Keep, PrefixKeeper, Sender
from k2cli.rank.engine.prefixes.tree import Hit, cache_tokens
from k2cli.rank.engine.requests import Running, Waiting
from k2cli.rank.engine.sampling import Sampler
from k2cli.rank.engine.waiting_line import WaitingLine, is_short

MAX_WAITING = 256
"""Requests of one key that wait; the connections of the guard bound those of all keys."""

_MOST_BLOCKED = 128
"""Requests without room that are looked at before each step: thousands may wait."""


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
        self._sender = sender
        self._tell = tell
        self._masks = masks
        self._context_length = context_length
        self._budget = Budget(
            tokens=worst_case_tokens(context_length, 0, context_length) * concurrency,
            batches=batches if can_batch else max(batches, concurrency),
            rows_per_batch=MAX_BATCH_ROWS if can_batch else 1,
        )
        self.keeper = PrefixKeeper(sender, whole_only=not cuttable_caches)
        self._prefixes = self.keeper.tree
        self._reported_use: KvCacheUse | None = None
        self._next_sequence = 0
        self.line = WaitingLine(self._prefixes)
        self._guest_batch = self._budget.batches if can_batch else None
        self.prefilling: list[Running] = []
        self.batches: dict[int, list[Running]] = {
            b: [] for b in range(self._budget.batches + can_batch)
        }
        self.draining: set[int] = set()
        """Batches with a row to be paused. All of them must have no step in flight for that, so
        none of them may start one."""

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
        worst = worst_case_tokens(len(request.prompt), request.max_tokens, self._context_length)
        if not request.prompt or len(request.prompt) >= self._context_length:
            error = (
                f"the prompt has {len(request.prompt)} tokens, "
                f"the context holds {self._context_length}"
            )
            self._tell(RequestFailed(request.request_id, error, "invalid"))
        elif worst > self._budget.tokens:
            error = f"the request may need {worst} tokens, the plan holds {self._budget.tokens}"
            self._tell(RequestFailed(request.request_id, error, "capacity"))
        elif (waiting := self.line.count_of(request.owner)) >= MAX_WAITING:
            error = f"{waiting} requests are waiting, the queue holds {MAX_WAITING}"
            self._tell(RequestFailed(request.request_id, error, "capacity"))
        elif request.grammar is not None and self._masks is None:
            error = "this run cannot make answers obey grammars"
            self._tell(RequestFailed(request.request_id, error, "internal"))
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
            self._forget_paused(waiting)
        self._tell(report)

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
        free = self._budget.tokens - used_tokens(self._worst_cases()) - kept
        if reading.read_some(self.line.has, free, self._evict):
            self._evict()

    # --- admission -------------------------------------------------------------------------------

    def admit(self, quiet: Collection[int]) -> None:
        """Admit waiting requests in fair order while there is memory for the next.

        One whose grammar is not compiled yet lets others pass. If there is no memory for the next,
        running requests may be paused for it, and short requests may pass it, with as much work as
        it has itself.

        Args:
            quiet: the batches that have no step in flight; others must not change.
        """
        self.draining.clear()
        while self._admit_next(quiet):
            pass

    def _admit_next(self, quiet: Collection[int]) -> bool:
        """Admit the first request that may start; return False if there is none."""
        blocked: list[Ticket[Waiting]] = []
        allowance = float(MOST_UNITS)
        refused: dict[tuple[str, bool], int] = {}
        for ticket in self.line.ready_in_order():
            if blocked and (not is_short(ticket) or ticket.cost > allowance):
                return False
            # What had no room for one has none for later ones of its kind that need as much.
            kind, worst = (ticket.owner, is_short(ticket)), self._worst_case(ticket.item)
            if kind not in refused or worst < refused[kind]:
                room = self._place(ticket)
                if room is None and not self.draining:
                    room = self._make_room(ticket, quiet)
                if room is not None:
                    for other in blocked:
                        other.item.passed_units += ticket.cost
                    self._start(ticket, room.batch)
                    return True
                refused[kind] = worst
            blocked.append(ticket)
            if len(blocked) == _MOST_BLOCKED:
                return False
            allowance = min(allowance, _units_that_may_pass(ticket))
        return False

    def _place(self, ticket: Ticket[Waiting], without: Collection[Running] = ()) -> Room | None:
        """Find room for a request, if some running ones were paused; None if there is none.

        A batch in which no cache must be dropped that somebody waits for is better than others.
        """
        worst = self._worst_cases(without)
        own = self._worst_case(ticket.item)
        kept = sum(cache_tokens(row.computed) for row in without)
        kept += self._prefixes.tokens_of(self.line.wanted_prefixes() - {ticket.item.prefix})
        found = None
        guest = self._guest_batch if is_short(ticket) else None
        usual = {batch: rows for batch, rows in worst.items() if batch != self._guest_batch}
        for batch in batches_with_room(worst, usual.keys(), guest, own, self._budget):
            with_it = {**worst, batch: [*worst[batch], own]}
            room = Room(batch, keeps=used_tokens(with_it) + kept <= self._budget.tokens)
            if room.keeps:
                return room
            found = found or room
        return found

    def _worst_case(self, waiting: Waiting) -> int:
        request = waiting.request
        return worst_case_tokens(len(request.prompt), request.max_tokens, self._context_length)

    def _make_room(self, ticket: Ticket[Waiting], quiet: Collection[int]) -> Room | None:
        """Pause requests for one that waits; return the room that it has then.

        If one of their batches has a step in flight, note that none may, and return None.
        """
        due = self.line.due(ticket)
        claim = Claim(ticket.owner, due, is_short(ticket), self.line.counter_of)
        chosen = choose_paused(claim, self.admitted, lambda rows: self._place(ticket, rows))
        decoding = {row.batch for row in chosen if row not in self.prefilling}
        if not decoding.issubset(quiet):
            self.draining = {batch for batch in decoding if batch is not None}
        if not chosen or self.draining:
            return None
        room = self._place(ticket, chosen)
        for row in chosen:
            self._pause(row)
        return room

    def _pause(self, row: Running) -> None:
        """Stop a request, keep its cache for itself, and let it wait until it can go on."""
        row.pauses += 1
        row.paused_at = time.monotonic()
        keep = self.keeper.keep_alone(row.held_tokens, _private_scope(row))
        waiting = Waiting(row.request, row.queued_at, row.masked, row, keep.prefix)
        self._leave(row, keep)
        row.unannounced = False
        self.line.rejoin(row, waiting)
        self._tell(Paused(row.request.request_id))
        self._evict()

    def _forget_paused(self, waiting: Waiting) -> None:
        if waiting.prefix is not None and waiting.prefix in self._prefixes:
            self.keeper.drop(waiting.prefix)
        waiting.prefix = None

    def _start(self, ticket: Ticket[Waiting], batch: int) -> None:
        self.line.start(ticket)
        self._open(ticket, batch)
        self._evict()

    def _open(self, ticket: Ticket[Waiting], batch: int) -> Running:
        waiting = ticket.item
        self._next_sequence += 1
        row = waiting.paused or self._running(ticket)
        row.sequence, row.units, row.steps = self._next_sequence, 0, len(row.generated)
        known = row.known_tokens
        hit = self._hit(waiting, known)
        row.prefill_target = len(known) - 1
        row.computed = 0 if hit is None else hit.tokens
        prefix = None if hit is None else hit.prefix
        row.batch = batch
        self.prefilling.append(row)
        release = self._make_room_beside(prefix, waiting)
        number = self._sender.next_number
        self._sender.submit(OpenSequence(number, row.sequence, prefix, row.computed, release))
        # Tokens that were never computed for it came from a cache, perhaps only after a pause.
        row.cached += max(0, row.computed - row.reached)
        row.reached = max(row.reached, row.computed)
        if waiting.paused is not None:
            row.paused_seconds += time.monotonic() - row.paused_at
            return row
        uncached = len(row.request.prompt) - row.cached
        if request_units(uncached, row.request.max_tokens) > SHORT_UNITS:
            row.is_short = False  # what it had in the cache when it came is gone
        row.reported = row.computed
        prompt = len(row.request.prompt)
        self._tell(PromptProgress(row.request.request_id, row.cached, prompt, row.cached))
        return row

    def _make_room_beside(self, opened: int | None, waiting: Waiting) -> list[int]:
        """Drop what a request that is opened leaves no room for, before its cache is made.

        Returns:
            Nodes that it is made from and that are dropped with it: layer by layer, since there is
            no room for a copy of all of them.
        """
        release = []
        if waiting.paused is not None and opened is not None and waiting.prefix == opened:
            self._prefixes.remove(opened)
            release.append(opened)
            waiting.prefix = None
        elif waiting.paused is not None:
            self._forget_paused(waiting)
        used, wanted = used_tokens(self._worst_cases()), self.line.wanted_prefixes()
        release += self.keeper.evict(used, self._budget.tokens, wanted, opened)
        return release

    def _hit(self, waiting: Waiting, known: Sequence[int]) -> Hit | None:
        """Return the prefix to use; a paused request has its own, unless that was dropped."""
        row = waiting.paused
        if row is not None and waiting.prefix is not None and waiting.prefix in self._prefixes:
            return Hit(waiting.prefix, row.computed)
        if waiting.request.use_prefix_cache:
            return self._prefixes.best(known, waiting.request.prefix_scope)
        return None

    def _running(self, ticket: Ticket[Waiting]) -> Running:
        waiting = ticket.item
        request = waiting.request
        return Running(
            request,
            self._next_sequence,
            ticket,
            Sampler(request.sampling, request.prompt),
            self._worst_case(waiting),
            waiting.since,
            time.monotonic(),
            waiting.masked,
            is_short=is_short(ticket),
        )

    # --- running requests ------------------------------------------------------------------------

    def prefill_order(self) -> list[Running]:
        """Return the requests in prefill, the one first whose next chunk is to be computed."""
        unfinished = [row for row in self.prefilling if row.prefill_left]
        return sorted(unfinished, key=self.line.running_order)

    def is_drafting(self, batch: int | None) -> bool:
        """True if a batch's row has drafted tokens in flight, so that the batch must not change."""
        return batch is not None and any(row.drafted for row in self.batches[batch])

    def cut_back(self, row: Running, tokens: int) -> None:
        """Remove the last computed tokens of a row: drafts that are wrong, or not needed."""
        assert row.batch is not None
        row.drafted = 0
        row.computed -= tokens
        if tokens:
            self._sender.submit(CutBack(self._sender.next_number, row.batch, tokens))

    def join(self, row: Running) -> None:
        """Make a request whose prompt is computed a row of its batch."""
        self.prefilling.remove(row)
        assert row.batch is not None
        self.batches[row.batch].append(row)
        self._sender.submit(JoinBatch(self._sender.next_number, row.batch, row.sequence))

    def balance(self, quiet: list[int]) -> None:
        """Move a request from a batch to one with fewer, so that all stages have work.

        Args:
            quiet: the batches that have no step in flight; others must not change.
        """
        expected = self._worst_cases()
        quiet = [batch for batch in quiet if batch != self._guest_batch]
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
            if used_tokens(moved) > self._budget.tokens:
                continue  # it would be padded to longer rows
            self.batches[source].pop()
            self.batches[target].append(row)
            row.batch = target
            number = self._sender.next_number
            told = row.unannounced_input
            self._sender.submit(LeaveBatch(number, source, row.sequence, move_to=target, told=told))
            row.unannounced = False
            self._evict()
            return

    def end(self, row: Running, reason: FinishReason) -> None:
        """Report a request's end, and keep its cache as a prefix if it may be used again."""
        last = row.generated[-1] if row.generated else None
        stopped_by_token = reason == "stop" and last in row.request.stop_tokens
        completion = len(row.generated) - stopped_by_token
        self._release(row, keep=row.request.use_prefix_cache)
        self._tell(row.finished(reason, completion))

    def fail(self, row: Running) -> None:
        """Report a request whose sampling failed, or whose grammar cannot be obeyed."""
        self._release(row, keep=False)
        problem = row.masked.problem if row.masked is not None else None
        if problem is None or row.failure is not None:
            problem = Problem(f"sampling failed: {row.failure}", "internal")
        self._tell(RequestFailed(row.request.request_id, problem.text, problem.kind))

    def _release(self, row: Running, *, keep: bool) -> None:
        row.ended = True
        self._close(row.masked)
        self.cut_back(row, row.drafted)
        tokens, scope = row.held_tokens, row.request.prefix_scope
        self._leave(row, self.keeper.keep(tokens, scope) if keep else Keep())
        self.line.end(row)
        self._evict()

    def _leave(self, row: Running, keep: Keep) -> None:
        assert row.batch is not None
        number, kept = self._sender.next_number, (keep.prefix, keep.below, keep.first)
        if row in self.prefilling:
            self.prefilling.remove(row)
            self._sender.submit(CloseSequence(number, row.sequence, *kept))
            return
        self.batches[row.batch].remove(row)
        told = row.unannounced_input
        self._sender.submit(LeaveBatch(number, row.batch, row.sequence, *kept, told=told))

    def _evict(self, more_tokens: int = 0) -> None:
        """Drop prefixes until the worst case of all requests fits, and so many tokens more."""
        used = used_tokens(self._worst_cases()) + more_tokens
        self.keeper.evict(used, self._budget.tokens, self.line.wanted_prefixes())
        if self._cache_use() != self._reported_use:
            self.report_cache_use()

    def report_cache_use(self) -> None:
        """Report how much of the KV cache is taken."""
        self._reported_use = self._cache_use()
        self._tell(self._reported_use)

    def _cache_use(self) -> KvCacheUse:
        return KvCacheUse(
            len(self._prefixes),
            self._prefixes.tokens(),
            used_tokens(self._worst_cases()),
            self._budget.tokens,
        )

    def _worst_cases(self, without: Collection[Running] = ()) -> dict[int, list[int]]:
        """Return the worst cases per batch; a sequence in prefill counts in its future batch."""
        worst: dict[int, list[int]] = {batch: [] for batch in self.batches}
        for row in self.admitted:
            if row not in without:
                assert row.batch is not None
                worst[row.batch].append(row.worst_case_tokens)
        return worst


def _units_that_may_pass(blocked: Ticket[Waiting]) -> int:
    """Return the cost that requests which start before one that is next may still have."""
    most = MOST_UNITS if blocked.item.paused else max(blocked.cost, SHORT_UNITS)
    return most - blocked.item.passed_units


def _private_scope(row: Running) -> str:
    """Return a scope that is no key's: no other request uses the cache of a paused one."""
    return f"paused {row.sequence}"
