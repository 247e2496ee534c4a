"""Speculation: when a row's next step verifies a draft, and of how many tokens.

A step that verifies a draft computes several tokens instead of one. It pays if more of them are
accepted than the step takes longer. Neither is known in advance: how long a step of so many tokens
takes depends on the model (each token of a MoE model reads other experts), the device, the link and
the context; and how often a draft is right depends on the text. So both are measured:

* the time of steps, between one result and the next: of ordinary ones for each request, and of
  those with a draft relative to it, for all requests of the run;
* the share of drafted tokens that were right, for each request, and apart for each length of the
  match that a draft comes from.

The *balance* of a request is the time that its drafts have saved, less the time they have cost. If
it falls below a small share of the time of its steps, no draft is tried until that share has grown.
So a text without repetitions loses no more than this share, and drafts are tried again, rarely.
Savings count for a few steps only, so that a long copy does not pay for drafts of later text.

While a step is in flight its result is unknown, so that the next step can have no draft. A row that
has a draft which should pay therefore has no step built ahead; what that costs is in the balance.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from statistics import median

from k2cli.choices import DRAFT_LENGTHS
from k2cli.rank.engine.draft_index import LONGEST_MATCH, SHORTEST_MATCH, DraftIndex, Match

_LEAST_GAIN = 1.05
"""Expected tokens per time, relative to ordinary steps, from which a draft is tried."""

_LOSS_SHARE = 0.01
"""Part of the time of a request's recent steps that drafts may lose."""

_LOSS_STEPS = 1.0
"""Steps whose time drafts may lose in addition: one with a draft may be slow by chance."""

_MOST_SAVED_STEPS = 4
"""Steps whose time the balance has at most: what a copy has saved must not pay for later text."""

_MEMORY = 0.998
"""What a step keeps of the balance and the time before: some 500 steps count."""

_EXPECTED_RATIO = 0.05
"""Time that a further token is expected to add to a step, relative to it, before it is measured."""

_LEAST_SAMPLES = 3
_SAMPLES = 9
_MOST_VERIFIED_IN_A_ROW = 64
"""Steps with drafts after which an ordinary one is measured again: the context has grown."""

_STEPS_BEFORE_RETRY = 50
"""Ordinary steps before a draft is tried that should not pay."""

_PRIOR_RIGHT = {2: 0.4, 3: 0.6, 4: 0.8}
_PRIOR_WEIGHT = 2.0
_TESTED_MEMORY = 0.9


@dataclass(slots=True)
class Acceptance:
    """The share of drafted tokens that were right, of those whose predecessors were."""

    prior: float
    _right: float = 0.0
    _tested: float = 0.0

    @property
    def share(self) -> float:
        """The estimate, between 0 and 1."""
        return (self._right + self.prior * _PRIOR_WEIGHT) / (self._tested + _PRIOR_WEIGHT)

    def observe(self, right: int, tested: int) -> None:
        """Record one draft: ``tested`` tokens, up to the first wrong one."""
        self._right = self._right * _TESTED_MEMORY + right
        self._tested = self._tested * _TESTED_MEMORY + tested

    def expected_tokens(self, drafted: int) -> float:
        """Return the tokens that a step with so many drafted ones gives, its own included."""
        share = self.share
        return sum(share**number for number in range(drafted + 1))


@dataclass(slots=True)
class RowDrafts:
    """The text of one request, and how its drafts did."""

    index: DraftIndex
    acceptance: dict[int, Acceptance] = field(
        default_factory=lambda: {
            length: Acceptance(_PRIOR_RIGHT[length])
            for length in range(SHORTEST_MATCH, LONGEST_MATCH + 1)
        }
    )
    balance_seconds: float = 0.0
    """What its drafts have saved, less what they have cost; older steps count less."""
    recent_seconds: float = 0.0
    """The time of its recent steps, of which drafts may lose a share."""
    plain_seconds: deque[float] = field(default_factory=lambda: deque(maxlen=_SAMPLES))
    """The times of its last ordinary steps."""
    plain: float = 0.0
    """Their median, 0 before the first."""
    verified_in_a_row: int = 0
    """Steps with drafts since the last ordinary one that counts."""
    plain_in_a_row: int = 0
    """Ordinary steps since the last one with a draft."""
    match_length: int = 0
    """The length of the match of the draft in flight."""
    waited_for: bool = False
    """True if the next step was not built ahead because of a draft."""
    is_late: bool = False
    """True if the step in flight was not, and yet has no draft."""
    planned_at: int = -1
    plan: tuple[Match, int] | None = None
    """The choice for a context of ``planned_at`` tokens."""

    def count(self, seconds: float, saved_seconds: float) -> None:
        """Count a step in the balance."""
        self.recent_seconds = self.recent_seconds * _MEMORY + seconds
        balance = self.balance_seconds * _MEMORY + saved_seconds
        self.balance_seconds = min(balance, _MOST_SAVED_STEPS * self.plain)

    @property
    def may_lose(self) -> bool:
        """True if a draft may be tried although it could be wrong."""
        return self.balance_seconds >= -self.allowance_seconds

    @property
    def allowance_seconds(self) -> float:
        """The time that drafts may have lost, when another one is tried."""
        return _LOSS_SHARE * self.recent_seconds + _LOSS_STEPS * self.plain


class Speculation:
    """Choice of drafts for all requests of a run, on the leader."""

    def __init__(self, *, always: bool = False) -> None:
        """Try every draft if ``always``, whether it should pay or not."""
        self._always = always
        self._ratios = {length: deque[float](maxlen=_SAMPLES) for length in DRAFT_LENGTHS}
        self._cost: dict[int, float] = {
            length: 1.0 + _EXPECTED_RATIO * length for length in DRAFT_LENGTHS
        }
        self._compiled: set[int] = set()

    def open(self, tokens: Iterable[int]) -> RowDrafts:
        """Begin with a request's text."""
        return RowDrafts(DraftIndex(tokens))

    def drafts(self, row: RowDrafts, most_tokens: int) -> list[int]:
        """Return the draft for a row's next step; empty for an ordinary step.

        Args:
            most_tokens: the most that a draft may have.
        """
        plan = self._plan(row, most_tokens)
        row.is_late, row.waited_for = row.waited_for and plan is None, False
        if plan is None:
            return []
        match, length = plan
        row.match_length = match.length
        return row.index.draft(match, length)

    def wants_draft(self, row: RowDrafts, most_tokens: int) -> bool:
        """True if the row would have a draft now, so that no step should be built ahead."""
        row.waited_for = self._plan(row, most_tokens) is not None
        return row.waited_for

    def _plan(self, row: RowDrafts, most_tokens: int) -> tuple[Match, int] | None:
        if row.planned_at != len(row.index):
            row.planned_at = len(row.index)
            row.plan = self._choose(row)
        if row.plan is None or row.plan[1] <= most_tokens:
            return row.plan
        shorter = [length for length in DRAFT_LENGTHS if length <= most_tokens]
        return (row.plan[0], shorter[-1]) if shorter else None

    def _choose(self, row: RowDrafts) -> tuple[Match, int] | None:
        if self._always:
            match = row.index.find()
            return None if match is None else (match, self._best(row, match)[0])
        if len(row.plain_seconds) < _LEAST_SAMPLES or not row.may_lose:
            return None
        if row.verified_in_a_row >= _MOST_VERIFIED_IN_A_ROW:
            return None
        match = row.index.find()
        if match is None:
            return None
        best, gain = self._best(row, match)
        if gain >= _LEAST_GAIN:
            return match, best
        # Nothing should pay. Now and then, if the balance allows it, a short draft may prove that
        # wrong.
        shortest = DRAFT_LENGTHS[0]
        loss = row.plain * (self._cost[shortest] - 1)
        allowed = row.balance_seconds - loss >= -row.allowance_seconds
        if allowed and row.plain_in_a_row >= _STEPS_BEFORE_RETRY:
            return match, shortest
        return None

    def _best(self, row: RowDrafts, match: Match) -> tuple[int, float]:
        """Return the length of a draft that should gain most, and the tokens per time then."""
        acceptance = row.acceptance[match.length]
        gains = {
            length: acceptance.expected_tokens(length) / self._cost[length]
            for length in DRAFT_LENGTHS
        }
        best = max(gains, key=lambda length: gains[length])
        return best, gains[best]

    def verified(
        self, row: RowDrafts, drafted: int, right: int, tokens: int, seconds: float
    ) -> None:
        """Record a step with a draft.

        Args:
            drafted: tokens of the draft, ``right`` of them right up to the first wrong one.
            tokens: that the step gave.
            seconds: since the result before.
        """
        row.acceptance[row.match_length].observe(right, min(right + 1, drafted))
        row.verified_in_a_row += 1
        row.plain_in_a_row = 0
        if not row.plain:
            return
        if drafted not in self._compiled:
            self._compiled.add(drafted)
            return  # kernels may have been compiled
        ratios = self._ratios[drafted]
        ratios.append(seconds / row.plain)
        cost = median(ratios)
        if len(ratios) <= _LEAST_SAMPLES:  # a first one that was disturbed must not decide
            cost = (1.0 + _EXPECTED_RATIO * drafted + len(ratios) * cost) / (1 + len(ratios))
        self._cost[drafted] = cost
        seconds = min(seconds, 2 * self._cost[drafted] * row.plain)  # a pause of the machine
        row.count(seconds, tokens * row.plain - seconds)

    def decoded(self, row: RowDrafts, seconds: float, *, usual: bool) -> None:
        """Record an ordinary step.

        Args:
            seconds: since the result before.
            usual: False if it was not built ahead, and others would be.
        """
        row.plain_in_a_row += 1
        if usual:
            row.plain_seconds.append(seconds)
            row.plain = median(row.plain_seconds)
            row.verified_in_a_row = 0
            row.count(row.plain, 0.0)
        elif row.is_late:
            seconds = min(seconds, 2 * row.plain)
            row.count(seconds, row.plain - seconds)
