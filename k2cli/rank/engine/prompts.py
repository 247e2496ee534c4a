"""The next prompt tokens to compute: a chunk of one prompt, or several short prompts together."""

from __future__ import annotations

from collections.abc import Sequence

from k2cli.protocol import Prefill, PrefillTogether
from k2cli.rank.engine.chunk_sizes import ChunkBounds, ChunkTimes
from k2cli.rank.engine.request_table import RequestTable
from k2cli.rank.engine.requests import Running

# In a pipeline a prompt is cut into several chunks per stage, so that stages overlap: with m
# chunks, s stages take (m + s - 1) / m times one stage's work.
CHUNKS_PER_STAGE = 4


class PromptChunks:
    """The chunks of prompts in prefill, whose sizes follow how long earlier ones took."""

    def __init__(
        self, table: RequestTable, bounds: ChunkBounds, *, stages: int, computes_together: bool
    ) -> None:
        """Compute short prompts together only if that is allowed and pays."""
        self._table = table
        self._bounds = bounds
        self._stages = stages
        self._computes_together = computes_together
        self._tokens_per_second = 0.0
        self._times = ChunkTimes()

    def limit(self, context: int) -> int:
        """Return the tokens of the next chunk: the plan's, or fewer to limit its time."""
        bounded = self._bounds.answering if self._answering else self._bounds.alone
        return bounded(self._tokens_per_second, context)

    @property
    def tokens_per_second(self) -> float:
        """The rate of recent chunks; 0 if there were none."""
        return self._tokens_per_second

    @property
    def _answering(self) -> bool:
        return any(self._table.batches.values())

    def start(self, number: int) -> tuple[Prefill | PrefillTogether, list[Running], int]:
        """Choose a chunk of the first prompt, or several short whole prompts.

        Returns:
            The decision of this number, its requests, and the tokens to compute with padding.
        """
        in_order = self._table.prefill_order()
        row = in_order[0]
        limit = self.limit(row.computed)
        together = self._short_prompts(
            in_order, limit if self._answering else self._bounds.together(self._tokens_per_second)
        )
        if len(together) > 1:
            return self._start_together(number, together)
        wanted = min(limit, self._overlapping_chunk(row))
        count = self._bounds.share(row.prefill_left, wanted)
        tokens = row.known_tokens[row.computed : row.computed + count]
        row.computed += count
        self._table.line.charge(row, 1)
        return Prefill(number, row.sequence, tokens), [row], count

    def _overlapping_chunk(self, row: Running) -> int:
        """Return the largest chunk of a prompt with which all pipeline stages still overlap."""
        if self._stages == 1:
            return row.prefill_left
        pieces = CHUNKS_PER_STAGE * self._stages
        return max(self._times.least_tokens, -(-(row.prefill_target + 1) // pieces))

    def _short_prompts(self, in_order: Sequence[Running], limit: int) -> list[Running]:
        """Choose new prompts for the first one's batch that fit one chunk, with padding."""
        first = in_order[0]
        if (
            not self._computes_together
            or first.computed
            or self._table.is_awaited(first)
            or self._table.is_drafting(first.batch)
        ):
            return []
        chosen: list[Running] = []
        longest = 0
        for row in in_order:
            if row.computed or row.batch != first.batch or not row.prefill_left:
                continue
            if self._table.is_awaited(row):
                continue
            longest = max(longest, row.prefill_left)
            if (len(chosen) + 1) * longest > limit:
                break
            chosen.append(row)
        return chosen

    def _start_together(
        self, number: int, rows: list[Running]
    ) -> tuple[PrefillTogether, list[Running], int]:
        batch = rows[0].batch
        assert batch is not None
        tokens = [row.known_tokens[: row.prefill_target] for row in rows]
        sequences = [row.sequence for row in rows]
        for row in rows:
            row.computed = row.prefill_target
            self._table.line.charge(row, 1)
            self._table.prefilling.remove(row)
        self._table.batches[batch] += rows
        count = len(rows) * max(map(len, tokens))
        return PrefillTogether(number, batch, sequences, tokens), rows, count

    def observe(self, tokens: int, seconds: float, waited_seconds: float) -> None:
        """Note how long a chunk took, and for how long of that this rank waited for others."""
        self._times.observe(tokens, seconds - waited_seconds)
        if seconds > 0:
            rate = tokens / seconds
            self._tokens_per_second = 0.5 * (self._tokens_per_second or rate) + 0.5 * rate

    def forget_rates(self) -> None:
        """Forget how long chunks took: during the warm-up they took longer than they will."""
        self._tokens_per_second = 0.0
        self._times = ChunkTimes()
