"""Drafts of running requests: which the next step verifies, and what of them is accepted.

``speculation`` decides from measured times if a draft pays; this module applies it to requests.
"""

from __future__ import annotations

from collections.abc import Sequence

from k2cli import choices
from k2cli.rank.engine.requests import Running
from k2cli.rank.engine.speculation import RowDrafts, Speculation


class Drafting:
    """Drafts for batches of one row; none at all without ``speculation``."""

    def __init__(self, speculation: choices.Speculation, context_length: int) -> None:
        self._speculation = (
            None if speculation == "off" else Speculation(always=speculation == "always")
        )
        self._context_length = context_length

    @property
    def is_on(self) -> bool:
        """True if steps may verify drafts."""
        return self._speculation is not None

    def drafts(self, rows: Sequence[Running]) -> list[int]:
        """Return the draft for the next step of a batch, which has no step in flight."""
        if self._speculation is None or len(rows) != 1 or not rows[0].may_speculate:
            return []
        (row,) = rows
        if row.speculation is None:
            row.speculation = self._speculation.open(row.known_tokens)
        _learn(row.speculation, row)
        return self._speculation.drafts(row.speculation, self._most_drafted(row))

    def wants_draft(self, rows: Sequence[Running]) -> bool:
        """True if a batch has a draft now, so that its step in flight should be waited for."""
        speculation = rows[0].speculation if len(rows) == 1 else None
        if self._speculation is None or speculation is None:
            return False
        _learn(speculation, rows[0])
        # One token more will be known.
        return self._speculation.wants_draft(speculation, self._most_drafted(rows[0]) - 1)

    def _most_drafted(self, row: Running) -> int:
        """Return the drafted tokens that a row has room for beside the one that its step gives."""
        known = len(row.request.prompt) + len(row.generated)
        left = min(self._context_length - known, row.request.max_tokens - len(row.generated))
        return left - 1

    def decoded(self, row: Running, seconds: float, *, usual: bool) -> None:
        """Note the time of an ordinary step of a row, with which drafts are compared."""
        if row.speculation is not None and self._speculation is not None and not row.ended:
            self._speculation.decoded(row.speculation, seconds, usual=usual)

    def accept(
        self, row: Running, drafts: Sequence[int], tokens: Sequence[int], seconds: float
    ) -> list[int]:
        """Return the tokens that a row takes of those chosen in a step with a draft.

        Tokens are accepted while each was what the draft had in its place; the first other one is
        the last, and so is a stop token.
        """
        right = 0
        while right < len(drafts) and tokens[right] == drafts[right]:
            right += 1
        taken = list(tokens[: right + 1])
        stops = (index for index, token in enumerate(taken) if token in row.request.stop_tokens)
        taken = taken[: next(stops, right) + 1]
        row.sampler.take_back(len(tokens) - len(taken))
        row.steps += len(taken) - 1
        row.draft_tokens += len(drafts)
        # A draft of a stop token can be right, but is no part of the answer.
        accepted = (token not in row.request.stop_tokens for token in taken[:right])
        row.accepted_tokens += sum(accepted)
        if self._speculation is not None and row.speculation is not None:
            self._speculation.verified(row.speculation, len(drafts), right, len(taken), seconds)
        return taken


def _learn(drafts: RowDrafts, row: Running) -> None:
    """Add the tokens of an answer that are not in its index yet."""
    known = len(drafts.index) - len(row.request.prompt)
    drafts.index.extend(row.generated[known:])
