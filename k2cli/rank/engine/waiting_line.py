"""The requests that wait in the engine: in fair order, and found by their ids."""

from __future__ import annotations

from collections.abc import Iterator

from k2cli.fair_queue import SHORT_UNITS, FairQueue, Ticket
from k2cli.rank.engine.prefixes.tree import PrefixTree
from k2cli.rank.engine.requests import Running, Waiting


class WaitingLine:
    """Requests that have not been admitted, or were paused.

    Args:
        prefixes: the kept prefixes, which make requests cheaper.
    """

    def __init__(self, prefixes: PrefixTree) -> None:
        self._prefixes = prefixes
        self._queue: FairQueue[Waiting] = FairQueue()
        self._tickets: dict[str, Ticket[Waiting]] = {}

    def __len__(self) -> int:
        return len(self._tickets)

    @property
    def tickets(self) -> list[Ticket[Waiting]]:
        """All that wait, in order of arrival."""
        return list(self._tickets.values())

    def order(self) -> list[str]:
        """Return the ids of the requests that have not begun, in the order of their admission."""
        found = self._queue.in_order()
        return [t.item.request.request_id for t in found if t.item.paused is None]

    def ready_in_order(self) -> Iterator[Ticket[Waiting]]:
        """Yield what may start, the next first; nothing may join or leave meanwhile."""
        return (ticket for ticket in self._queue.in_order() if ticket.item.is_ready)

    def count_of(self, owner: str) -> int:
        """Return the number of requests of a key that wait."""
        return self._queue.waiting_of(owner)

    def find(self, request_id: str) -> Ticket[Waiting] | None:
        """Return the ticket of a request that waits."""
        return self._tickets.get(request_id)

    def has(self, waiting: Waiting) -> bool:
        """True if this entry waits."""
        ticket = self._tickets.get(waiting.request.request_id)
        return ticket is not None and ticket.item is waiting

    def join(self, waiting: Waiting) -> None:
        """Add a request."""
        request = waiting.request
        self.find_prefix(waiting)
        self._tickets[request.request_id] = self._queue.join(
            waiting, request.owner, request.prompt, request.max_tokens, waiting.cached_tokens
        )

    def find_prefix(self, waiting: Waiting) -> None:
        """Note the kept prefix that a request will use, among those that are kept now."""
        request, hit = waiting.request, None
        waiting.found_among = self._prefixes.count_added
        if request.use_prefix_cache:
            hit = self._prefixes.find(request.prompt, request.prefix_scope)
        waiting.prefix = None if hit is None else hit.prefix
        waiting.cached_tokens = 0 if hit is None else hit.tokens

    def rejoin(self, row: Running, waiting: Waiting) -> None:
        """Add a request that was paused; one that had not begun gets its place back."""
        row.ticket.item = waiting
        self._tickets[waiting.request.request_id] = row.ticket
        self._queue.rejoin(row.ticket, begun=row.units > 0)

    def leave(self, ticket: Ticket[Waiting]) -> None:
        """Remove a request that ends while it waits."""
        del self._tickets[ticket.item.request.request_id]
        self._queue.leave(ticket)

    def start(self, ticket: Ticket[Waiting]) -> None:
        """Remove a request that starts."""
        del self._tickets[ticket.item.request.request_id]
        self._queue.start(ticket)

    def end(self, row: Running) -> None:
        """Record the end of a request that has started."""
        self._queue.end(row.ticket)

    def charge(self, row: Running, units_per_token: int) -> None:
        """Count the work up to ``row.computed``; what is computed again after a pause is free."""
        units = max(0, row.computed - row.reached) * units_per_token
        row.reached = max(row.reached, row.computed)
        row.units += units
        self._queue.charge(row.ticket, units)

    def running_order(self, row: Running) -> tuple[float, float, int]:
        """Return the order of running requests: the least one is computed first."""
        return self._queue.running_order(row.ticket)

    def waiting_order(self, ticket: Ticket[Waiting]) -> tuple[float, float, int]:
        """Return the order that a request would have among running ones if it started now."""
        return self._queue.counter_of(ticket.owner), self._queue.due(ticket), ticket.number

    def due(self, ticket: Ticket[Waiting]) -> float:
        """Return the virtual time of its key at which a request is due."""
        return self._queue.due(ticket)

    def counter_of(self, owner: str) -> float:
        """Return the units that were computed for a key."""
        return self._queue.counter_of(owner)

    def wanted_prefixes(self) -> set[int]:
        """Return the kept prefixes that these requests will use."""
        found = (ticket.item.prefix for ticket in self._tickets.values())
        return {prefix for prefix in found if prefix is not None}


def is_short(ticket: Ticket[Waiting]) -> bool:
    """True if a request is done soon once it starts; the limit of its answer counts in full."""
    return ticket.item.paused is None and ticket.cost <= SHORT_UNITS
