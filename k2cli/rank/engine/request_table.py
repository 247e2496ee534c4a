"""The leader's table of requests: waiting, in prefill, or decoding in a batch.

It admits requests by memory, balances batches, and keeps or releases the caches of finished
requests. Each change is a decision, which the ``Sender`` sends to all ranks in order.

The plan's KV budget is ``context_length * concurrency`` tokens on every rank. A batch is as long
as its longest row, so a batch's worst case is its number of rows times the longest worst case.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from k2cli.protocol import (
    CloseSequence,
    Decision,
    DropPrefix,
    FinishReason,
    Generate,
    JoinBatch,
    KvCacheUse,
    LeaveBatch,
    OpenSequence,
    PromptProgress,
    RankMessage,
    RequestFailed,
)
from k2cli.rank.engine.masks import MaskedAnswer, Masks, Problem
from k2cli.rank.engine.prefixes import LEAST_REUSE_TOKENS, PrefixDirectory, cache_tokens
from k2cli.rank.engine.requests import Running, Waiting
from k2cli.rank.engine.sampling import Sampler

MAX_BATCH_ROWS = 32
MAX_WAITING = 256


@dataclass(frozen=True, slots=True)
class Budget:
    """Room for KV caches, in tokens, and the number of batches that run side by side."""

    tokens: int
    batches: int
    rows_per_batch: int = MAX_BATCH_ROWS


class Sender(Protocol):
    """Numbering and sending of decisions to all ranks, in order."""

    @property
    def next_number(self) -> int:
        """Number of the next decision."""

    def submit(self, decision: Decision) -> None:
        """Send a decision."""


class RequestTable:
    """Requests by their state, and the prefixes that are kept for later requests."""

    def __init__(
        self,
        sender: Sender,
        tell: Callable[[RankMessage], None],
        *,
        context_length: int,
        concurrency: int,
        batches: int,
        can_batch: bool,
        plain_caches: bool,
        masks: Masks | None = None,
    ) -> None:
        """Make a table of ``batches`` side by side, each of one request unless ``can_batch``.

        Without ``masks``, requests with grammars are refused.
        """
        self._sender = sender
        self._tell = tell
        self._masks = masks
        self._context_length = context_length
        self._budget = Budget(
            tokens=worst_case_tokens(context_length, 0, context_length) * concurrency,
            batches=batches if can_batch else max(batches, concurrency),
            rows_per_batch=MAX_BATCH_ROWS if can_batch else 1,
        )
        self._prefixes = PrefixDirectory(whole_only=not plain_caches)
        self._reported_use: KvCacheUse | None = None
        self._next_sequence = 0
        self.waiting: deque[Waiting] = deque()
        self.prefilling: deque[Running] = deque()
        self.batches: dict[int, list[Running]] = {b: [] for b in range(self._budget.batches)}

    @property
    def empty(self) -> bool:
        """True if no request waits or runs."""
        return not (self.waiting or self.prefilling or any(self.batches.values()))

    @property
    def admitted(self) -> list[Running]:
        """The requests that run: in prefill, or in a batch."""
        return [*self.prefilling, *(row for rows in self.batches.values() for row in rows)]

    def enqueue(self, request: Generate) -> None:
        """Queue a request, or refuse it with the numbers."""
        worst = worst_case_tokens(len(request.prompt), request.max_tokens, self._context_length)
        if not request.prompt or len(request.prompt) >= self._context_length:
            error = (
                f"the prompt has {len(request.prompt)} tokens, "
                f"the context holds {self._context_length}"
            )
            self._tell(RequestFailed(request.request_id, error, "invalid"))
        elif worst > self._budget.tokens:
            error = f"the request may need {worst} tokens, the plan holds {self._budget.tokens}"
            self._tell(RequestFailed(request.request_id, error, "capacity"))
        elif len(self.waiting) >= MAX_WAITING:
            error = f"{len(self.waiting)} requests are waiting, the queue holds {MAX_WAITING}"
            self._tell(RequestFailed(request.request_id, error, "capacity"))
        elif request.grammar is not None and self._masks is None:
            error = "this run cannot make answers obey grammars"
            self._tell(RequestFailed(request.request_id, error, "internal"))
        else:
            masked = None
            if request.grammar is not None and self._masks is not None:
                masked = self._masks.open(request.grammar, request.stop_tokens)
            self.waiting.append(Waiting(request, time.monotonic(), masked))

    def cancel(self, request_id: str) -> None:
        """Mark a running request as cancelled, or remove it from the queue."""
        for row in self.admitted:
            if row.request.request_id == request_id:
                row.cancelled = True
                return
        for waiting in self.waiting:
            if waiting.request.request_id == request_id:
                self._drop_waiting(waiting)
                self._tell(waiting.ended("cancelled"))
                return

    def _drop_waiting(self, waiting: Waiting) -> None:
        self.waiting.remove(waiting)
        self._close(waiting.masked)

    def _close(self, masked: MaskedAnswer | None) -> None:
        if masked is not None and self._masks is not None:
            self._masks.close(masked)

    def end_cancelled(self) -> None:
        """End all requests that were cancelled."""
        for row in [row for row in self.admitted if row.cancelled]:
            self.end(row, "cancelled")

    def end_masked(self) -> None:
        """End the requests whose grammars allow no more, or cannot be obeyed."""
        for waiting in [waiting for waiting in self.waiting if waiting.masked is not None]:
            assert waiting.masked is not None
            if waiting.masked.problem is not None:
                self._drop_waiting(waiting)
                problem = waiting.masked.problem
                self._tell(RequestFailed(waiting.request.request_id, problem.text, problem.kind))
            elif waiting.masked.complete:
                self._drop_waiting(waiting)
                self._tell(waiting.ended("stop"))
        for row in [row for row in self.admitted if row.masked is not None]:
            assert row.masked is not None
            if row.masked.problem is not None:
                self.fail(row)
            elif row.masked.complete:
                self.end(row, "stop")

    def admit(self) -> None:
        """Admit waiting requests in order of arrival while the plan has memory for the next.

        One whose grammar is not compiled yet lets others pass.
        """
        for waiting in list(self.waiting):
            if waiting.masked is not None and waiting.masked.pending:
                continue
            request = waiting.request
            worst = worst_case_tokens(len(request.prompt), request.max_tokens, self._context_length)
            batch = choose_batch(self._worst_cases(), worst, self._budget)
            if batch is None:
                return
            self.waiting.remove(waiting)
            row = self._open(waiting, worst)
            row.batch = batch
            self.prefilling.append(row)
            self._evict()

    def _open(self, waiting: Waiting, worst: int) -> Running:
        request = waiting.request
        self._next_sequence += 1
        hit = None
        if request.use_prefix_cache:
            hit = self._prefixes.best(request.prompt, request.prefix_scope)
        row = Running(
            request,
            self._next_sequence,
            Sampler(request.sampling, request.prompt),
            worst,
            waiting.since,
            time.monotonic(),
            waiting.masked,
        )
        if hit is not None:
            row.cached = row.computed = hit.tokens
        prefix = None if hit is None else hit.prefix
        number = self._sender.next_number
        self._sender.submit(OpenSequence(number, row.sequence, prefix, row.cached))
        prompt = len(request.prompt)
        self._tell(PromptProgress(request.request_id, row.cached, prompt, row.cached))
        return row

    def join(self, row: Running) -> None:
        """Make a request whose prompt is computed a row of its batch."""
        self.prefilling.remove(row)
        assert row.batch is not None
        self.batches[row.batch].append(row)
        self._sender.submit(JoinBatch(self._sender.next_number, row.batch, row.sequence))

    def balance(self, quiet: list[int]) -> None:
        """Move a request from a batch to one with fewer, so that all stages have work.

        Args:
            quiet: the batches that have no step in flight; others must not change.
        """
        expected = self._worst_cases()
        for source in quiet:
            target = min(quiet, key=lambda batch: len(expected[batch]))
            if len(self.batches[source]) < 2 or len(expected[source]) - len(expected[target]) < 2:
                continue
            row = self.batches[source].pop()
            self.batches[target].append(row)
            row.batch = target
            number = self._sender.next_number
            told = row.unannounced_input
            self._sender.submit(LeaveBatch(number, source, row.sequence, move_to=target, told=told))
            row.unannounced = False
            return

    def end(self, row: Running, reason: FinishReason) -> None:
        """Report a request's end, and keep its cache as a prefix if it may be used again."""
        last = row.generated[-1] if row.generated else None
        stopped_by_token = reason == "stop" and last in row.request.stop_tokens
        completion = len(row.generated) - stopped_by_token
        self._release(row, keep=row.request.use_prefix_cache)
        self._tell(row.finished(reason, completion))

    def fail(self, row: Running) -> None:
        """Report a request whose sampling failed, or whose grammar cannot be obeyed."""
        self._release(row, keep=False)
        problem = row.masked.problem if row.masked is not None else None
        if problem is None or row.failure is not None:
            problem = Problem(f"sampling failed: {row.failure}", "internal")
        self._tell(RequestFailed(row.request.request_id, problem.text, problem.kind))

    def _release(self, row: Running, *, keep: bool) -> None:
        row.ended = True
        self._close(row.masked)
        assert row.batch is not None
        keep_as = self._keep(row) if keep else None
        number = self._sender.next_number
        if row in self.prefilling:
            self.prefilling.remove(row)
            self._sender.submit(CloseSequence(number, row.sequence, keep_as))
        else:
            self.batches[row.batch].remove(row)
            told = row.unannounced_input
            self._sender.submit(LeaveBatch(number, row.batch, row.sequence, keep_as, told=told))
        self._evict()

    def _keep(self, row: Running) -> int | None:
        """Keep a sequence's tokens as a prefix; return its id, or None if it is not worth it."""
        tokens, scope = row.held_tokens, row.request.prefix_scope
        if len(tokens) < LEAST_REUSE_TOKENS or self._prefixes.has(tokens, scope):
            return None
        for prefix in list(self._prefixes.redundant(tokens, scope)):
            self._drop(prefix)
        return self._prefixes.add(tokens, scope)

    def _drop(self, prefix: int) -> None:
        self._prefixes.remove(prefix)
        self._sender.submit(DropPrefix(self._sender.next_number, prefix))

    def _evict(self) -> None:
        """Drop the least recently used prefixes until the worst case of all requests fits."""
        used = used_tokens(self._worst_cases())
        while used + self._prefixes.tokens() > self._budget.tokens:
            oldest = self._prefixes.oldest()
            if oldest is None:
                break
            self._drop(oldest)
        if self._cache_use() != self._reported_use:
            self.report_cache_use()

    def report_cache_use(self) -> None:
        """Report how much of the KV cache is taken."""
        self._reported_use = self._cache_use()
        self._tell(self._reported_use)

    def _cache_use(self) -> KvCacheUse:
        return KvCacheUse(
            len(self._prefixes),
            self._prefixes.tokens(),
            used_tokens(self._worst_cases()),
            self._budget.tokens,
        )

    def _worst_cases(self) -> dict[int, list[int]]:
        """Return the worst cases per batch; a sequence in prefill counts in its future batch."""
        worst = {b: [row.worst_case_tokens for row in rows] for b, rows in self.batches.items()}
        for row in self.prefilling:
            assert row.batch is not None
            worst[row.batch].append(row.worst_case_tokens)
        return worst


def worst_case_tokens(prompt: int, max_tokens: int, context_length: int) -> int:
    """Return the most tokens that a request's cache may hold."""
    return cache_tokens(min(prompt + max_tokens, context_length))


def used_tokens(batches: Mapping[int, Sequence[int]]) -> int:
    """Return the worst case of all batches, given the worst cases of their rows."""
    return sum(len(rows) * max(rows, default=0) for rows in batches.values())


def choose_batch(
    batches: Mapping[int, Sequence[int]], worst_case: int, budget: Budget
) -> int | None:
    """Choose the batch that a new request should join; None if it must wait.

    It is the batch with the fewest rows, so that all pipeline stages have work, in which the
    worst case of all batches stays within the budget.

    Args:
        batches: worst cases in tokens of each batch's rows, for every batch that may be used.
    """
    order = sorted(batches, key=lambda batch: (len(batches[batch]), batch))
    for batch in order:
        if len(batches[batch]) >= budget.rows_per_batch:
            continue
        with_it = {**batches, batch: [*batches[batch], worst_case]}
        if used_tokens(with_it) <= budget.tokens:
            return batch
    return None
