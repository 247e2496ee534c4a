"""The choice of running requests that are paused for one that waits.

A paused request keeps its KV cache as a prefix while there is memory for it, and goes on later. It
is paused

* for a short request, unless it is short itself, or its key has been computed less for than the
  other's;
* for a request whose key has fewer requests running, by two or more;
* for a request whose key has none running, after a longer time.

Before it may be paused (again) it must have been computed for a while, and if its cache will have
to be dropped, for twice the work that computing it again takes. So every request makes progress,
and at most a third of the work is done twice.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from k2cli.rank.engine.requests import Running

QUANTUM_UNITS = 256
"""Work after which a request may be paused for a short one, or for a key with fewer requests."""

TURN_UNITS = 1024
"""Work after which a request may be paused for one of a key that has none running."""

_LOSS_FACTOR = 2


@dataclass(frozen=True, slots=True)
class Claim:
    """A request that waits, and is next: its key, and if it is short.

    ``counter_of`` returns how much was computed for a key.
    """

    owner: str
    is_short: bool
    counter_of: Callable[[str], float]

    def passes(self, row: Running) -> bool:
        """True if a short request may pass a running one."""
        owner = row.request.owner
        is_behind = owner == self.owner or self.counter_of(self.owner) <= self.counter_of(owner)
        return self.is_short and not row.is_short and is_behind


@dataclass(frozen=True, slots=True)
class Room:
    """Room after requests are paused: if the claim fits, and if their caches can be kept then."""

    fits: bool
    keeps: bool


def choose_paused(
    claim: Claim, running: Iterable[Running], room_without: Callable[[Sequence[Running]], Room]
) -> list[Running]:
    """Choose the requests to pause so that a claim fits; empty if that is not allowed.

    Args:
        room_without: returns the room if some requests were paused.
    """
    rows = [row for row in running if not (row.ended or row.cancelled)]
    counts = Counter(row.request.owner for row in rows)
    chosen: list[Running] = []

    def cost(row: Running) -> tuple[int, int]:
        return -counts[row.request.owner], row.computed

    while True:
        allowed = [row for row in rows if row not in chosen and _may_pause(row, claim, counts)]
        if not allowed:
            return []
        chosen.append(min(allowed, key=cost))
        counts[chosen[-1].request.owner] -= 1
        room = room_without(chosen)
        if room.fits:
            kept = room.keeps or all(row.units >= _LOSS_FACTOR * row.computed for row in chosen)
            return chosen if kept else []


def _may_pause(row: Running, claim: Claim, counts: Counter[str]) -> bool:
    more = counts[row.request.owner] - counts[claim.owner]
    if claim.passes(row):
        least = QUANTUM_UNITS
    elif row.request.owner == claim.owner:
        return False
    elif more >= 2:
        least = QUANTUM_UNITS
    elif counts[claim.owner] == 0:
        least = TURN_UNITS
    else:
        return False
    return row.units >= least
