"""Keeping of finished and paused requests' caches as prefixes, and their end when memory is short.

Each change is a decision to all ranks: see ``kv_cache.kept_prefixes`` for what a rank does.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

from k2cli.protocol import Decision, DropPrefix, SplitPrefix
from k2cli.rank.engine.prefixes.tree import Place, PrefixTree

_MOST_ADDED = 256


class Sender(Protocol):
    """Numbering and sending of decisions to all ranks, in order."""

    @property
    def next_number(self) -> int:
        """Number of the next decision."""

    def submit(self, decision: Decision) -> None:
        """Send a decision."""


@dataclass(frozen=True, slots=True)
class Keep:
    """A way to keep a sequence's cache: without the ``first`` tokens, which ``below`` has.

    ``prefix`` None: it is not kept.
    """

    prefix: int | None = None
    below: int | None = None
    first: int = 0


class PrefixKeeper:
    """The kept prefixes, and the decisions that change them."""

    def __init__(self, sender: Sender, *, whole_only: bool) -> None:
        """Keep whole sequences only if ``whole_only``: their caches cannot be cut back."""
        self._sender = sender
        self.tree = PrefixTree(whole_only=whole_only)
        self.added: deque[int] = deque(maxlen=_MOST_ADDED)
        """Prefixes that were kept and may be stored on a disk, the newest last."""

    def keep(self, tokens: Sequence[int], scope: str, *, stores: bool = True) -> Keep:
        """Prepare the tree for a sequence that leaves; the decision that it leaves must follow.

        Args:
            stores: True if it may be stored on a disk.
        """
        place = self.tree.place(tokens, scope)
        if place is None:
            return Keep()
        below = self._below(place)
        for prefix in place.replaced:
            self.drop(prefix)
        added = self.tree.add(tokens[place.start :], scope, below)
        if stores:
            self.added.append(added)
        return Keep(added, below, place.start)

    def keep_read(self, tokens: Sequence[int], scope: str, first: int) -> Keep:
        """Prepare the tree for tokens whose caches, from ``first`` on, were read from a disk.

        Those before may not be there any more: then nothing is kept.
        """
        place = self.tree.place(tokens, scope, extend=False)
        if place is None or place.start < first:
            return Keep()
        below = self._below(place)
        return Keep(self.tree.add(tokens[place.start :], scope, below), below, place.start)

    def _below(self, place: Place) -> int | None:
        if place.split is None:
            return place.below
        above = self.tree.split(place.split, place.split_tokens)
        number = self._sender.next_number
        self._sender.submit(SplitPrefix(number, place.split, above, place.split_tokens))
        return above

    def keep_alone(self, tokens: Sequence[int], scope: str) -> Keep:
        """Keep a whole sequence in a scope of its own, however short it is."""
        return Keep(self.tree.add(tokens, scope)) if tokens else Keep()

    def drop(self, prefix: int) -> None:
        """Drop a prefix that no other continues."""
        self.tree.remove(prefix)
        self._sender.submit(DropPrefix(self._sender.next_number, prefix))

    def evict(
        self,
        used_tokens: int,
        budget_tokens: int,
        spared: Collection[int],
        opened: int | None = None,
    ) -> list[int]:
        """Drop prefixes until they fit the budget beside what requests may use.

        The least recently used are dropped first, but after all others those that a waiting
        request will use: else conversations that take turns would lose theirs just before.

        Returns:
            The nodes of ``opened`` that are dropped by the decision that opens it, which must
            follow.
        """
        path = self.tree.path_of(opened)
        release = []
        while used_tokens + self.tree.tokens() > budget_tokens:
            oldest = self.tree.oldest(spared)
            if oldest is None:
                break
            if oldest in path:
                self.tree.remove(oldest)
                release.append(oldest)
            else:
                self.drop(oldest)
        return release
