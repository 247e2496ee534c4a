"""The choice of running requests that are paused for one that waits.

A paused request keeps its KV cache as a prefix while there is memory for it, and goes on later. It
is paused

* for a short request, unless it is short itself, or its key has been computed less for than the
  other's;
* for a request whose key has fewer requests running, by two or more;
* for a request whose key has none running, after a longer time.

Before it may be paused (again) it must have been computed for a while, and if its cache will have
to be dropped, for twice the work of computing it again. So every request makes progress, and at
most a third of the work is done twice. One of which nothing is computed yet goes back to its
place in the queue.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from k2cli.rank.engine.requests import Running

QUANTUM_UNITS = 128
"""Work after which a request may be paused for a short one, or for a key with fewer requests."""

NEW_KEY_UNITS = 1024
"""Work after which a request may be paused for one of a key that has none running."""

_LOSS_FACTOR = 2


@dataclass(frozen=True, slots=True)
class Claim:
    """A request that waits, and is next: its key, when it is due, and if it is short.

    ``counter_of`` returns how much was computed for a key.
    """

    owner: str
    due: float
    is_short: bool
    counter_of: Callable[[str], float]

    def passes(self, row: Running) -> bool:
        """True if a short request may pass a running one."""
        owner = row.request.owner
        is_behind = owner == self.owner or self.counter_of(self.owner) <= self.counter_of(owner)
        return self.is_short and not row.is_short and is_behind


@dataclass(frozen=True, slots=True)
class Room:
    """Room for a claim in a batch; ``keeps`` if no cache must be dropped that is waited for."""

    batch: int
    keeps: bool


def choose_paused(
    claim: Claim,
    running: Iterable[Running],
    room_without: Callable[[Sequence[Running]], Room | None],
) -> list[Running]:
    """Choose the requests to pause so that a claim fits; empty if that is not allowed.

    One whose cache can be kept is better than others, and then one of the key with the most. If
    none is enough, several are paused.

    Args:
        room_without: returns the room if some requests were paused, None if there is none.
    """
    rows = [row for row in running if not (row.ended or row.cancelled)]
    counts = Counter(row.request.owner for row in rows)
    rows.sort(key=lambda row: (-counts[row.request.owner], row.computed))
    allowed = [row for row in rows if _may_pause(row, claim, counts)]
    lossy = None
    for row in allowed:
        room = room_without([row])
        if room is not None and room.keeps:
            return [row]
        if room is not None and lossy is None and _may_lose(row):
            lossy = [row]
    return lossy or _several(claim, allowed, counts, room_without)


def _several(
    claim: Claim,
    rows: Iterable[Running],
    counts: Counter[str],
    room_without: Callable[[Sequence[Running]], Room | None],
) -> list[Running]:
    chosen: list[Running] = []
    for row in rows:
        if not _may_lose(row) or not _may_pause(row, claim, counts):
            continue
        chosen.append(row)
        counts[row.request.owner] -= 1
        if room_without(chosen) is not None:
            return chosen
    return []


def _may_lose(row: Running) -> bool:
    """True if its cache may be dropped: enough was done since it was computed last."""
    return row.units >= _LOSS_FACTOR * row.computed


def _may_pause(row: Running, claim: Claim, counts: Counter[str]) -> bool:
    more = counts[row.request.owner] - counts[claim.owner]
    if claim.passes(row):
        # One that has not begun has its place back, if it is due later.
        later = claim.due < row.ticket.due or claim.owner != row.request.owner
        least = 0 if not row.units and not row.pauses and later else QUANTUM_UNITS
    elif row.request.owner == claim.owner:
        return False
    elif more >= 2:
        least = QUANTUM_UNITS
    elif counts[claim.owner] == 0:
        least = NEW_KEY_UNITS
    else:
        return False
    return row.units >= least
