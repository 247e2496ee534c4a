"""The order of requests that wait: fair between keys, and inside a key between conversations.

Two levels of virtual time. Between keys it is that of the virtual token counter (Sheng et al.,
"Fairness in Serving Large Language Models", 2024): each key has a counter of what was computed for
it, and the key with the lowest one is next. A key that had nothing to do starts at the lowest
counter of those that wait, so that nobody saves up. Inside a key it is weighted fair queueing
(Demers, Keshav and Shenker 1989): virtual time advances by the work done, divided by the number of
conversations that have work. A request is due at the virtual time of its arrival, or the end of its
conversation's earlier work, plus its own cost; the one that is due first is next. So a short
request passes long ones. A request of cost C is passed by requests that come later with at most as
much work as C for each conversation that has work meanwhile, since later ones are due later.

A conversation is known by its tokens: a prompt that begins with the last prompt of a conversation
of the same key continues it. No field of a client decides about that.

Work is counted in units: the time of one prompt token. The engine and the guard use this module,
the latter for requests beyond the limit of their key.
"""

from __future__ import annotations

import hashlib
import heapq
import itertools
from array import array
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

ANSWER_UNITS = 4
"""Units of an answer's token. A step for a whole batch takes a GPU as long as 10 to 30 tokens of a
prompt, and is shared by its rows; on a CPU a token of an answer takes little longer than one of a
prompt."""

LEAST_UNITS = 64
"""The cost of the shortest request."""

MOST_UNITS = 4096
"""The cost of the longest request in the order, and the most by which a conversation that was
computed while others had nothing to do is behind them."""

EXPECTED_ANSWER_TOKENS = 256
"""Tokens of an answer that the order expects at most: many set limits far above what they use."""

SHORT_UNITS = 512
"""A request of up to this cost is short: 120 tokens of a prompt and 98 of an answer, or less."""

_TAIL_TOKENS = 4
"""Tokens at the end of a prompt that its continuation may not have: those that open reasoning."""
_MOST_CONVERSATIONS = 512
_MOST_KEYS = 1024
_DIGEST_BYTES = 16

T = TypeVar("T")


@dataclass(slots=True, eq=False)
class Conversation:
    """A conversation of a key: its last prompt, and the virtual time of its next request.

    ``requests`` counts those that wait or run.
    """

    tokens: int = 0
    digest: bytes = b""
    time: float = 0.0
    requests: int = 0


@dataclass(slots=True, eq=False)
class Ticket(Generic[T]):
    """The place of a request. ``floor`` is its key's virtual time when it came.

    ``due`` is set when it starts.
    """

    item: T
    owner: str
    conversation: Conversation
    cost: int
    floor: float
    number: int
    due: float = 0.0


@dataclass(slots=True, eq=False)
class _Key(Generic[T]):
    """One key: its counter, its virtual time, its conversations and what waits in each.

    ``running`` counts requests, ``active`` the conversations with requests that wait or run.
    """

    counter: float = 0.0
    time: float = 0.0
    running: int = 0
    active: int = 0
    waiting: dict[Conversation, deque[Ticket[T]]] = field(default_factory=dict)
    known: dict[tuple[int, bytes], Conversation] = field(default_factory=dict)

    def in_order(self) -> Iterator[Ticket[T]]:
        """Yield what waits, due first; the requests of a conversation in order of arrival."""
        heads: list[tuple[float, int, Ticket[T], Iterator[Ticket[T]]]] = []
        for conversation, queue in self.waiting.items():
            rest = iter(queue)
            first = next(rest)
            heads.append((_due(first, conversation.time), first.number, first, rest))
        heapq.heapify(heads)
        while heads:
            due, _, ticket, rest = heads[0]
            yield ticket
            follower = next(rest, None)
            if follower is None:
                heapq.heappop(heads)
            else:
                following = (_due(follower, due), follower.number, follower, rest)
                heapq.heapreplace(heads, following)


class FairQueue(Generic[T]):
    """Requests that wait, of any number of keys. Not thread-safe."""

    def __init__(self) -> None:
        self._keys: dict[str, _Key[T]] = {}
        self._numbers = itertools.count()
        self._waiting = 0
        self._highest = 0.0

    def __len__(self) -> int:
        return self._waiting

    def __contains__(self, ticket: Ticket[T]) -> bool:
        key = self._keys.get(ticket.owner)
        return key is not None and ticket in key.waiting.get(ticket.conversation, ())

    def waiting_of(self, owner: str) -> int:
        """Return the number of requests of a key that wait."""
        key = self._keys.get(owner)
        return sum(map(len, key.waiting.values())) if key else 0

    def counter_of(self, owner: str) -> float:
        """Return the units that were computed for a key, with what it was lifted by."""
        return self._keys[owner].counter

    def join(
        self,
        item: T,
        owner: str,
        prompt: Sequence[int],
        max_tokens: int,
        cached_tokens: int | None = None,
    ) -> Ticket[T]:
        """Add a request.

        Args:
            item: what the ticket is for.
            owner: the id of its key.
            prompt: its tokens.
            max_tokens: limit of its answer.
            cached_tokens: tokens of the prompt that need not be computed; if None, those that the
                last prompt of its conversation had.
        """
        key = self._key(owner)
        conversation, known_tokens = self._conversation(key, prompt)
        cached = known_tokens if cached_tokens is None else cached_tokens
        cost = request_units(len(prompt) - cached, max_tokens)
        conversation.time = min(conversation.time, key.time + MOST_UNITS)
        ticket = Ticket(item, owner, conversation, cost, key.time, next(self._numbers))
        if not conversation.requests:
            key.active += 1
        conversation.requests += 1
        self._add(key, ticket)
        return ticket

    def rejoin(self, ticket: Ticket[T], *, begun: bool = True) -> None:
        """Add a request again that was stopped; what is left of it counts as a short one.

        One that has not ``begun`` has its earlier place.
        """
        key = self._key(ticket.owner)
        key.running -= 1
        if begun:
            ticket.cost, ticket.floor = LEAST_UNITS, key.time
            ticket.conversation.time = min(ticket.conversation.time, key.time)
        self._add(key, ticket, first=True)

    def _add(self, key: _Key[T], ticket: Ticket[T], *, first: bool = False) -> None:
        if not key.waiting:
            others = [other for other in self._keys.values() if other is not key]
            waiting = [other.counter for other in others if other.waiting]
            running = [other.counter for other in others if other.running]
            key.counter = max(key.counter, min(waiting or running, default=self._highest))
        queue = key.waiting.setdefault(ticket.conversation, deque())
        if first:
            queue.appendleft(ticket)
        else:
            queue.append(ticket)
        self._waiting += 1

    def in_order(self) -> Iterator[Ticket[T]]:
        """Yield what waits in the order in which it would start now, if nothing else came."""
        heads: list[tuple[float, int, int, Ticket[T], Iterator[Ticket[T]]]] = []
        for key in self._keys.values():
            if key.waiting:
                rest = key.in_order()
                first = next(rest)
                heads.append((key.counter, key.running, first.number, first, rest))
        heapq.heapify(heads)
        while heads:
            counter, running, _, ticket, rest = heads[0]
            yield ticket
            following = next(rest, None)
            if following is None:
                heapq.heappop(heads)
            else:
                later = (counter + ticket.cost, running + 1, following.number, following, rest)
                heapq.heapreplace(heads, later)

    def start(self, ticket: Ticket[T]) -> None:
        """Take a request out, because it starts."""
        key = self._keys[ticket.owner]
        self._take_out(key, ticket)
        conversation = ticket.conversation
        ticket.due = _due(ticket, conversation.time)
        conversation.time = max(conversation.time, ticket.floor)
        key.running += 1

    def leave(self, ticket: Ticket[T]) -> None:
        """Take a request out that ends while it waits."""
        key = self._keys[ticket.owner]
        self._take_out(key, ticket)
        self._release(key, ticket)

    def _take_out(self, key: _Key[T], ticket: Ticket[T]) -> None:
        queue = key.waiting[ticket.conversation]
        queue.remove(ticket)
        if not queue:
            del key.waiting[ticket.conversation]
        self._waiting -= 1

    def charge(self, ticket: Ticket[T], units: float) -> None:
        """Count work for a request that has started."""
        key = self._keys[ticket.owner]
        key.counter += units
        key.time += units / max(1, key.active)
        ticket.conversation.time += units

    def end(self, ticket: Ticket[T]) -> None:
        """Record the end of a request that has started."""
        key = self._keys[ticket.owner]
        key.running -= 1
        self._highest = max(self._highest, key.counter)
        self._release(key, ticket)

    def _release(self, key: _Key[T], ticket: Ticket[T]) -> None:
        ticket.conversation.requests -= 1
        if not ticket.conversation.requests:
            key.active -= 1

    def due(self, ticket: Ticket[T]) -> float:
        """Return the virtual time of its key at which a request that waits is due."""
        return _due(ticket, ticket.conversation.time)

    def running_order(self, ticket: Ticket[T]) -> tuple[float, float, int]:
        """Return the order of requests that have started: the least one is computed first."""
        return self._keys[ticket.owner].counter, ticket.due, ticket.number

    # --- keys and conversations ------------------------------------------------------------------

    def _key(self, owner: str) -> _Key[T]:
        key = self._keys.get(owner)
        if key is None:
            if len(self._keys) >= _MOST_KEYS:
                self._forget_keys()
            key = self._keys[owner] = _Key()
        return key

    def _forget_keys(self) -> None:
        """Forget the keys that have no request: a revoked one never comes back."""
        used = {owner: key for owner, key in self._keys.items() if key.waiting or key.running}
        self._keys = used

    def _conversation(self, key: _Key[T], prompt: Sequence[int]) -> tuple[Conversation, int]:
        """Return the conversation that a prompt continues or begins, and the tokens they share."""
        text = array("q", prompt).tobytes()
        size = array("q").itemsize
        own_tokens = len(prompt) - min(_TAIL_TOKENS, len(prompt) // 4)
        lengths = sorted({length for length, _ in key.known if length <= len(prompt)})
        hasher, hashed, found = hashlib.blake2b(digest_size=_DIGEST_BYTES), 0, None
        own_digest = b""
        for length in sorted({*lengths, own_tokens}):
            hasher.update(text[hashed * size : length * size])
            hashed, digest = length, hasher.copy().digest()
            found = key.known.get((length, digest)) or found
            if length == own_tokens:
                own_digest = digest
        shared = found.tokens if found is not None else 0
        conversation = found or Conversation(time=key.time)
        key.known.pop((conversation.tokens, conversation.digest), None)
        if own_tokens > conversation.tokens:
            conversation.tokens, conversation.digest = own_tokens, own_digest
        key.known[conversation.tokens, conversation.digest] = conversation  # the most recent
        if len(key.known) > _MOST_CONVERSATIONS:
            del key.known[next(iter(key.known))]
        return conversation, shared


def request_units(prompt_tokens: int, max_tokens: int) -> int:
    """Return the cost of a request for the order, of which ``prompt_tokens`` must be computed."""
    answer = ANSWER_UNITS * min(max_tokens, EXPECTED_ANSWER_TOKENS)
    return min(MOST_UNITS, max(LEAST_UNITS, prompt_tokens + answer))


def _due(ticket: Ticket[T], conversation_time: float) -> float:
    return max(ticket.floor, conversation_time) + ticket.cost
