"""The leader's scheduler: which requests run, in which steps, and what becomes of them.

Continuous batching: requests join and leave decode batches at any step. Prompts are computed in
chunks between decode steps, so that a long one does not stall running answers. In a pipeline
there is a batch per stage, and as many steps in flight, so that no stage is idle while there is
work for it. Between any two steps the inbox is looked at, so that a cancellation takes effect
within one step. An error inside one request's sampling ends that request and no other.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import cast

from k2cli.runtime.admission import (
    MAX_WAITING,
    Budget,
    choose_batch,
    used_tokens,
    worst_case_tokens,
)
from k2cli.runtime.agreement import Agreement
from k2cli.runtime.control import Followers
from k2cli.runtime.executor import Executor, StepResult
from k2cli.runtime.prefixes import LEAST_REUSE_TOKENS, PrefixDirectory
from k2cli.runtime.protocol import (
    Cancel,
    CloseSequence,
    Decision,
    Decode,
    DropPrefix,
    FinishReason,
    Generate,
    JoinBatch,
    LeaveBatch,
    OpenSequence,
    Prefill,
    PromptProgress,
    Quit,
    RankMessage,
    RequestFailed,
    Tick,
    Tokens,
)
from k2cli.runtime.requests import Running, Waiting
from k2cli.runtime.sampling import Sampler
from k2cli.runtime.steps import Step, StepQueue

# While answers are running, a prompt chunk may hold them up for about this long.
STALL_SECONDS = 0.5
LEAST_CHUNK_TOKENS = 32


class Engine:
    """Serves requests on the leader rank; not thread-safe, everything happens in one thread."""

    def __init__(
        self,
        executor: Executor,
        followers: Followers,
        send: Callable[[RankMessage], None],
        *,
        size: int,
        context_length: int,
        concurrency: int,
        prefill_chunk_tokens: int,
    ) -> None:
        stages = size if executor.is_pipeline else 1
        self._queue = StepQueue(executor, followers)
        self._agreement = Agreement(followers, size)
        self._send = send
        self._context_length = context_length
        self._chunk = prefill_chunk_tokens
        self._looks_ahead = size == 1
        self._window = 2 if self._looks_ahead else stages
        can_batch = executor.stage.can_batch
        self._budget = Budget(
            tokens=worst_case_tokens(context_length, 0, context_length) * concurrency,
            batches=stages if can_batch else max(stages, concurrency),
            **({} if can_batch else {"rows_per_batch": 1}),
        )
        self._prefixes = PrefixDirectory(whole_only=not executor.stage.has_plain_caches)
        self._waiting: deque[Waiting] = deque()
        self._prefilling: deque[Running] = deque()
        self._batches: dict[int, list[Running]] = {b: [] for b in range(self._budget.batches)}
        self._next_sequence = 0
        self._turn = 0
        self._last_started: dict[int, int] = {}
        self._prefill_rate = 0.0
        self._last_completion = 0.0

    # --- what the worker calls -------------------------------------------------------------------

    @property
    def busy(self) -> bool:
        """Whether there is work."""
        return bool(self._waiting or self._prefilling or self._queue.computing) or any(
            self._batches.values()
        )

    def accept(self, message: Generate | Cancel) -> None:
        """Take a request, or its cancellation, into account."""
        if isinstance(message, Generate):
            self._enqueue(message)
            return
        for row in self._admitted():
            if row.request.request_id == message.request_id:
                row.cancelled = True
                return
        for waiting in self._waiting:
            if waiting.request.request_id == message.request_id:
                self._waiting.remove(waiting)
                self._send(waiting.cancelled())
                return

    def advance(self) -> None:
        """Keep as many steps in flight as there are stages, and complete the oldest.

        Raises:
            ConnectionLost: if a follower is gone.
            ClusterError: if a follower's state differs from the leader's.
        """
        self._agreement.check()
        self._end_cancelled()
        self._admit()
        self._balance()
        while self._queue.computing < self._window and self._start_step():
            pass
        step = self._queue.complete()
        if step is not None:
            self._completed(step)

    def tick(self) -> None:
        """Tell the followers that nothing is to be done."""
        self._queue.complete()  # what is left of it are entries in the books
        self._agreement.check()
        self.now(Tick(self._queue.next_number))

    def quit(self) -> None:
        """Tell the followers to end."""
        self._queue.submit(Quit(self._queue.next_number))

    def now(self, decision: Decision) -> StepResult:
        """Carry a decision out on all ranks at once; only while nothing is in flight."""
        return self._queue.now(decision)

    @property
    def next_number(self) -> int:
        """The number that the next decision must bear."""
        return self._queue.next_number

    # --- coming and going ------------------------------------------------------------------------

    def _admitted(self) -> list[Running]:
        return [*self._prefilling, *(row for rows in self._batches.values() for row in rows)]

    def _enqueue(self, request: Generate) -> None:
        worst = worst_case_tokens(len(request.prompt), request.max_tokens, self._context_length)
        if not request.prompt or len(request.prompt) >= self._context_length:
            error = (
                f"the prompt has {len(request.prompt)} tokens, "
                f"the context holds {self._context_length}"
            )
            self._send(RequestFailed(request.request_id, error, "invalid"))
        elif worst > self._budget.tokens:
            error = f"the request may need {worst} tokens, the plan holds {self._budget.tokens}"
            self._send(RequestFailed(request.request_id, error, "capacity"))
        elif len(self._waiting) >= MAX_WAITING:
            error = f"{len(self._waiting)} requests are waiting, the queue holds {MAX_WAITING}"
            self._send(RequestFailed(request.request_id, error, "capacity"))
        else:
            self._waiting.append(Waiting(request, time.monotonic()))

    def _worst_cases(self) -> dict[int, list[int]]:
        """Worst cases per batch; a sequence in prefill counts where it will join."""
        worst = {b: [row.worst_case_tokens for row in rows] for b, rows in self._batches.items()}
        for row in self._prefilling:
            assert row.batch is not None
            worst[row.batch].append(row.worst_case_tokens)
        return worst

    def _admit(self) -> None:
        """Let in, first come first served, whoever the plan's memory has room for."""
        while self._waiting:
            waiting = self._waiting[0]
            request = waiting.request
            worst = worst_case_tokens(len(request.prompt), request.max_tokens, self._context_length)
            batch = choose_batch(self._worst_cases(), worst, self._budget)
            if batch is None:
                return
            self._waiting.popleft()
            row = self._open(waiting, worst)
            row.batch = batch
            self._prefilling.append(row)
            self._evict()

    def _open(self, waiting: Waiting, worst: int) -> Running:
        request = waiting.request
        self._next_sequence += 1
        hit = self._prefixes.best(request.prompt) if request.use_prefix_cache else None
        row = Running(
            request,
            self._next_sequence,
            Sampler(request.sampling, request.prompt),
            worst,
            waiting.since,
            time.monotonic(),
        )
        if hit is not None:
            row.cached = row.computed = hit.tokens
        prefix = None if hit is None else hit.prefix
        self._decide(OpenSequence(self.next_number, row.sequence, prefix, row.cached))
        return row

    def _evict(self) -> None:
        """Forget the prefixes used least recently until running requests have their room."""
        used = used_tokens(self._worst_cases())
        while used + self._prefixes.tokens() > self._budget.tokens:
            oldest = self._prefixes.oldest()
            if oldest is None:
                return
            self._drop(oldest)

    def _drop(self, prefix: int) -> None:
        self._prefixes.remove(prefix)
        self._decide(DropPrefix(self.next_number, prefix))

    def _end_cancelled(self) -> None:
        for row in [row for row in self._admitted() if row.cancelled]:
            self._end(row, "cancelled")

    def _end(self, row: Running, reason: FinishReason) -> None:
        """Report a request's end, and keep its cache as a prefix if that is of use."""
        completion = len(row.generated) - (reason == "stop")
        self._release(row, keep=row.request.use_prefix_cache)
        self._send(row.finished(reason, completion))

    def _fail(self, row: Running) -> None:
        self._release(row, keep=False)
        self._send(RequestFailed(row.request.request_id, f"sampling failed: {row.failure}"))

    def _release(self, row: Running, *, keep: bool) -> None:
        row.ended = True
        assert row.batch is not None
        keep_as = self._keep(row) if keep else None
        if row in self._prefilling:
            self._prefilling.remove(row)
            self._decide(CloseSequence(self.next_number, row.sequence, keep_as))
        else:
            self._batches[row.batch].remove(row)
            self._decide(LeaveBatch(self.next_number, row.batch, row.sequence, keep_as))
        self._evict()

    def _keep(self, row: Running) -> int | None:
        """The id under which a sequence's cache is kept, if it is worth it."""
        tokens = row.held_tokens
        if len(tokens) < LEAST_REUSE_TOKENS or self._prefixes.has(tokens):
            return None
        for prefix in list(self._prefixes.redundant(tokens)):
            self._drop(prefix)
        return self._prefixes.add(tokens)

    def _balance(self) -> None:
        """Move a request from a full batch to an empty one, so that no stage runs dry."""
        quiet = [b for b in self._batches if not self._queue.decodes_of(b)]
        expected = self._worst_cases()
        for source in quiet:
            target = min(quiet, key=lambda b: len(expected[b]))
            if len(self._batches[source]) < 2 or len(expected[source]) - len(expected[target]) < 2:
                continue
            row = self._batches[source].pop()
            self._batches[target].append(row)
            row.batch = target
            self._decide(
                LeaveBatch(self.next_number, source, row.sequence, keep_as=None, move_to=target)
            )
            return

    # --- steps -----------------------------------------------------------------------------------

    def _decide(self, decision: Decision) -> None:
        self._queue.submit(decision)

    def _start_step(self) -> bool:
        """Decide one computing step; False if there is nothing that can start now."""
        ready = [batch for batch in self._batches if self._can_decode(batch)]
        prefill = next((row for row in self._prefilling), None)
        if prefill is not None and (not ready or self._turn >= len(ready)):
            self._turn = 0
            if prefill.prefill_left:
                self._start_prefill(prefill)
                return True
            self._join(prefill)
            return self._start_step()
        if not ready:
            return False
        self._turn += 1
        # The batch that has waited longest comes first: the others have steps in flight.
        self._start_decode(min(ready, key=lambda batch: self._last_started.get(batch, 0)))
        return True

    def _join(self, row: Running) -> None:
        self._prefilling.remove(row)
        assert row.batch is not None
        self._batches[row.batch].append(row)
        self._decide(JoinBatch(self.next_number, row.batch, row.sequence))

    def _can_decode(self, batch: int) -> bool:
        rows = self._batches[batch]
        if not any(row.wants_steps for row in rows):
            return False
        in_flight = self._queue.decodes_of(batch)
        if not in_flight:
            return True
        return (
            self._looks_ahead
            and len(in_flight) == 1
            and in_flight[0].rows == rows
            and not any(row.sampler.needs_history for row in rows)
        )

    def _start_prefill(self, row: Running) -> None:
        count = min(row.prefill_left, self._chunk_tokens())
        tokens = row.request.prompt[row.computed : row.computed + count]
        row.computed += count
        self._queue.submit(Prefill(self.next_number, row.sequence, tokens), [row])

    def _chunk_tokens(self) -> int:
        """Tokens of the next prompt chunk: the plan's, or less while answers are running."""
        if not any(self._batches.values()) or not self._prefill_rate:
            return self._chunk
        return max(LEAST_CHUNK_TOKENS, min(self._chunk, int(self._prefill_rate * STALL_SECONDS)))

    def _start_decode(self, batch: int) -> None:
        rows = list(self._batches[batch])
        in_flight = self._queue.decodes_of(batch)
        chosen = in_flight[-1].chosen if in_flight else None
        tokens = [] if in_flight else [row.next_input for row in rows]
        for row in rows:
            row.steps += 1
            row.computed += 1
        number = self.next_number
        self._last_started[batch] = number
        decision = Decode(number, batch, tokens, state_digest=self._agreement.is_due(number))
        self._queue.submit(decision, rows, chosen)

    def _completed(self, step: Step) -> None:
        now = time.monotonic()
        if isinstance(step.decision, Prefill):
            self._prefilled(step.rows[0], step.decision, now)
        elif isinstance(step.decision, Decode):
            assert step.result is not None
            if step.result.state_digest:
                self._agreement.expect(step.decision.step, step.result.state_digest)
            self._decoded(step, now)
        self._last_completion = now

    def _prefilled(self, row: Running, decision: Prefill, now: float) -> None:
        elapsed = now - max(self._last_completion, row.started_at)
        if elapsed > 0:
            rate = len(decision.tokens) / elapsed
            self._prefill_rate = 0.5 * (self._prefill_rate or rate) + 0.5 * rate
        if not row.ended:
            prompt = row.request.prompt
            done = min(row.computed, len(prompt))
            self._send(PromptProgress(row.request.request_id, done, len(prompt), row.cached))

    def _decoded(self, step: Step, now: float) -> None:
        assert step.chosen is not None
        tokens = cast(list[int], step.chosen.tolist())
        for index, (row, token) in enumerate(zip(step.rows, tokens, strict=True)):
            if row.ended:
                continue
            if row.failure is not None:
                self._fail(row)
            else:
                self._take(row, token, step, index, now)

    def _take(self, row: Running, token: int, step: Step, index: int, now: float) -> None:
        """Give a request its next token, and end it if that was its last."""
        request = row.request
        if row.first_token_at is None:
            row.first_token_at = now
        row.generated.append(token)
        if token in request.stop_tokens:
            self._end(row, "stop")
            return
        assert step.result is not None
        assert step.result.logits is not None
        try:
            logprob = row.sampler.logprob(step.result.logits[index], token)
            row.sampler.record(token)
        except Exception as error:  # as in choose_tokens
            row.failure = error
            self._fail(row)
            return
        self._send(Tokens(request.request_id, [token], [] if logprob is None else [logprob]))
        full = len(request.prompt) + len(row.generated) >= self._context_length
        if full or len(row.generated) >= request.max_tokens:
            self._end(row, "length")
