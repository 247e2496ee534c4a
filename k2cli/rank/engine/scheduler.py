"""The choice of the step that is started next: a chunk of prompts, or one step of a batch.

Prompts are computed in chunks between decode steps, so that a long one does not stall running
answers; of several prompts, the chunk of the one that is due first is next. A pipeline has a batch
per stage, and as many steps in flight, so that no stage is idle while there is work for it.
"""

from __future__ import annotations

from collections.abc import Callable

from k2cli.fair_queue import ANSWER_UNITS
from k2cli.protocol import Decode
from k2cli.rank.agreement import Agreement
from k2cli.rank.engine.admission import Admission
from k2cli.rank.engine.drafting import Drafting
from k2cli.rank.engine.prompts import PromptChunks
from k2cli.rank.engine.request_table import RequestTable
from k2cli.rank.engine.steps import StepQueue


class Scheduler:
    """Starts as many steps as may be in flight."""

    def __init__(
        self,
        table: RequestTable,
        admission: Admission,
        queue: StepQueue,
        prompts: PromptChunks,
        drafting: Drafting,
        agreement: Agreement,
        *,
        stages: int,
        looks_ahead: bool,
        prefill_chunk_tokens: int,
        before_chunk: Callable[[], None],
    ) -> None:
        """Call ``before_chunk`` before a chunk is started, which may take long."""
        self._table = table
        self._admission = admission
        self._queue = queue
        self._prompts = prompts
        self._drafting = drafting
        self._agreement = agreement
        self._stages = stages
        self._looks_ahead = looks_ahead
        self._before_chunk = before_chunk
        # At least two when looking ahead: while one step is computed, the next is built.
        self._window = max(2 if looks_ahead else 1, stages)
        self._turn = 0
        self._prefill_credit = prefill_chunk_tokens
        self._last_started: dict[int, int] = {}

    def is_built_ahead(self, batch: int) -> bool:
        """True if steps of a batch are usually built while the one before is computed."""
        # Steps of several batches fill the window, so that none is built ahead.
        active = sum(bool(rows) for rows in self._table.batches.values())
        return self._looks_ahead and active < self._window and self._queue.may_look_ahead(batch)

    def start_steps(self) -> None:
        """Start steps until as many are in flight as there are stages, or can be."""
        while self._queue.computing < self._window and self._start_step():
            pass

    def _start_step(self) -> bool:
        """Decide one computing step; return False if none can start now.

        Prompts and answers take turns: every batch decodes once, then as many prompt tokens are
        computed as one chunk may have.
        """
        prefilling = self._table.prefilling
        for row in [row for row in prefilling if not row.prefill_left]:
            if not self._table.is_drafting(row.batch):
                self._table.join(row)
        ready = [batch for batch in self._table.batches if self._can_decode(batch)]
        if ready and self._turn >= len(ready):
            self._turn = 0
            first = self._table.prefill_order()[:1]
            self._prefill_credit = self._prompts.limit(first[0].computed if first else 0)
        if self._table.prefill_order() and (not ready or self._prefill_credit > 0):
            if self._stages == 1 and self._queue.computing:
                return False  # a chunk is computed at once, and tokens in flight would wait for it
            self._start_prefill()
            return True
        if not ready:
            return False
        self._turn += 1
        # Start the batch that has waited longest: the others have steps in flight.
        self._start_decode(min(ready, key=lambda batch: self._last_started.get(batch, 0)))
        return True

    def _start_prefill(self) -> None:
        """Start a chunk of the first prompt, or several short whole prompts together."""
        self._before_chunk()
        decision, rows, count = self._prompts.start(self._queue.next_number)
        self._prefill_credit -= count
        self._queue.submit(decision, rows)

    def _can_decode(self, batch: int) -> bool:
        rows = self._table.batches[batch]
        if not any(row.wants_steps for row in rows):
            return False
        if batch in self._admission.draining:
            return False
        in_flight = self._queue.decodes_of(batch)
        if not in_flight:
            return True
        return (
            self._looks_ahead
            and len(in_flight) == 1
            and in_flight[0].chosen is not None
            and in_flight[0].rows == rows
            and not in_flight[0].drafts
            and self._queue.may_look_ahead(batch)
            and not self._drafting.wants_draft(rows)
        )

    def _start_decode(self, batch: int) -> None:
        rows = list(self._table.batches[batch])
        in_flight = self._queue.decodes_of(batch)
        chosen = in_flight[-1].chosen if in_flight else None
        ahead = chosen is not None
        drafts = [] if ahead else self._drafting.drafts(rows)
        tokens = [] if ahead else [row.next_input for row in rows]
        told = [row.unannounced_input for row in rows]
        for row in rows:
            row.steps += 1
            row.computed += 1
            self._table.line.charge(row, ANSWER_UNITS)
            row.unannounced = ahead
            row.drafted = len(drafts)
            row.computed += row.drafted
        number = self._queue.next_number
        self._last_started[batch] = number
        decision = Decode(
            number,
            batch,
            tokens,
            state_digest=self._agreement.is_due(number),
            ahead=ahead,
            told=told if any(token >= 0 for token in told) else [],
            drafts=drafts,
        )
        self._queue.submit(decision, rows, chosen)
