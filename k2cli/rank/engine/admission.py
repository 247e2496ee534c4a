"""Admission: which waiting requests start, in which batch, and what is paused for them.

A request is admitted in fair order, if there is memory for its longest cache; ``pausing`` chooses
the running requests that give way.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence

from k2cli.fair_queue import MOST_UNITS, SHORT_UNITS, Ticket, request_units
from k2cli.protocol import OpenSequence, Paused, PromptProgress
from k2cli.rank.engine.budget import batches_with_room, used_tokens
from k2cli.rank.engine.pausing import Claim, Room, choose_paused
from k2cli.rank.engine.prefixes.tree import Hit, cache_tokens
from k2cli.rank.engine.request_table import RequestTable
from k2cli.rank.engine.requests import Running, Waiting
from k2cli.rank.engine.sampling import Sampler
from k2cli.rank.engine.shared_prompts import awaited_row
from k2cli.rank.engine.waiting_line import is_short

_MOST_BLOCKED = 128
"""Requests without room that are looked at before each step: thousands may wait."""


class Admission:
    """Starts the requests of a table that wait."""

    def __init__(self, table: RequestTable) -> None:
        self._table = table
        self._line = table.line
        self._prefixes = table.keeper.tree
        self._next_sequence = 0
        self.draining: set[int] = set()
        """Batches with a row to be paused. All of them must have no step in flight for that, so
        none of them may start one."""

    def admit(self, quiet: Collection[int]) -> None:
        """Admit waiting requests in fair order while there is memory for the next.

        One whose grammar is not compiled yet, or whose prompt is just computed for another, lets
        others pass. If there is no memory for the next,
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
        for ticket in self._line.ready_in_order():
            awaited = self._awaited(ticket.item)
            if awaited is not None:
                self._table.await_prompt(awaited, ticket)
                continue
            if blocked and (not is_short(ticket) or ticket.cost > allowance):
                return False
            # What had no room for one has none for later ones of its kind that need as much.
            kind = (ticket.owner, is_short(ticket))
            worst = self._table.worst_case(ticket.item.request)
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

    def _awaited(self, waiting: Waiting) -> Running | None:
        """Return the running request whose prompt this one waits for; None if it need not."""
        if self._prefixes.whole_only:
            return None
        awaited = awaited_row(waiting, self._table.prefilling, self._line.counter_of)
        if awaited is not None and waiting.found_among != self._prefixes.count_added:
            self._line.find_prefix(waiting)
            awaited = awaited_row(waiting, self._table.prefilling, self._line.counter_of)
        return awaited

    def _place(self, ticket: Ticket[Waiting], without: Collection[Running] = ()) -> Room | None:
        """Find room for a request, if some running ones were paused; None if there is none.

        A batch in which no cache must be dropped that somebody waits for is better than others.
        """
        worst = self._table.worst_cases(without)
        own = self._table.worst_case(ticket.item.request)
        kept = sum(cache_tokens(row.computed) for row in without)
        kept += self._prefixes.tokens_of(self._line.wanted_prefixes() - {ticket.item.prefix})
        found = None
        guest = self._table.guest_batch if is_short(ticket) else None
        usual = {batch: rows for batch, rows in worst.items() if batch != self._table.guest_batch}
        for batch in batches_with_room(worst, usual.keys(), guest, own, self._table.budget):
            with_it = {**worst, batch: [*worst[batch], own]}
            room = Room(batch, keeps=used_tokens(with_it) + kept <= self._table.budget.tokens)
            if room.keeps:
                return room
            found = found or room
        return found

    def _make_room(self, ticket: Ticket[Waiting], quiet: Collection[int]) -> Room | None:
        """Pause requests for one that waits; return the room that it has then.

        If one of their batches has a step in flight, note that none may, and return None.
        """
        due = self._line.due(ticket)
        claim = Claim(ticket.owner, due, is_short(ticket), self._line.counter_of)
        chosen = choose_paused(claim, self._table.admitted, lambda rows: self._place(ticket, rows))
        decoding = {row.batch for row in chosen if row not in self._table.prefilling}
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
        keep = self._table.keeper.keep_alone(row.held_tokens, _private_scope(row))
        waiting = Waiting(row.request, row.queued_at, row.masked, row, keep.prefix)
        self._table.leave(row, keep)
        row.unannounced = False
        self._line.rejoin(row, waiting)
        self._table.tell(Paused(row.request.request_id))
        self._table.evict()

    def _start(self, ticket: Ticket[Waiting], batch: int) -> None:
        self._line.start(ticket)
        self._open(ticket, batch)
        self._table.evict()

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
        self._table.prefilling.append(row)
        release = self._make_room_beside(prefix, waiting)
        number = self._table.sender.next_number
        self._table.sender.submit(OpenSequence(number, row.sequence, prefix, row.computed, release))
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
        self._table.tell(PromptProgress(row.request.request_id, row.cached, prompt, row.cached))
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
            self._table.forget_paused(waiting)
        used, wanted = used_tokens(self._table.worst_cases()), self._line.wanted_prefixes()
        release += self._table.keeper.evict(used, self._table.budget.tokens, wanted, opened)
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
            self._table.worst_case(request),
            waiting.since,
            time.monotonic(),
            waiting.masked,
            is_short=is_short(ticket),
        )


def _units_that_may_pass(blocked: Ticket[Waiting]) -> int:
    """Return the cost that requests which start before one that is next may still have."""
    most = MOST_UNITS if blocked.item.paused else max(blocked.cost, SHORT_UNITS)
    return most - blocked.item.passed_units


def _private_scope(row: Running) -> str:
    """Return a scope that is no key's: no other request uses the cache of a paused one."""
    return f"paused {row.sequence}"
