"""The engine of the leader: it takes requests, keeps steps in flight, and applies their results.

Continuous batching: requests join and leave decode batches at any step. ``admission``
starts those of the ``request_table`` that wait, ``scheduler`` chooses the steps. The worker reads
its inbox between any two steps, so that a cancellation takes effect within one step. An error
inside one request's sampling ends that request and no other.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import cast

import mlx.core as mx

from k2cli import choices
from k2cli.fair_queue import ANSWER_UNITS
from k2cli.protocol import (
    Cancel,
    Decision,
    Decode,
    Generate,
    OpenStore,
    Prefill,
    PrefillTogether,
    PromptProgress,
    Quit,
    RankMessage,
    Tick,
    Tokens,
    WaitingOrder,
)
from k2cli.rank.agreement import Agreement
from k2cli.rank.control import Followers
from k2cli.rank.engine.admission import Admission
from k2cli.rank.engine.chunk_sizes import ChunkBounds
from k2cli.rank.engine.drafting import Drafting
from k2cli.rank.engine.masks import Masks
from k2cli.rank.engine.prefixes.disk_cache import DiskCache
from k2cli.rank.engine.prefixes.keeper import PrefixKeeper
from k2cli.rank.engine.prompts import PromptChunks
from k2cli.rank.engine.request_table import RequestTable
from k2cli.rank.engine.requests import Running
from k2cli.rank.engine.scheduler import Scheduler
from k2cli.rank.engine.steps import Step, StepQueue
from k2cli.rank.executor import Executor, StepResult
from k2cli.rank.kv_cache.segments import can_cut

# While only grammars are compiled, other messages are looked for this often.
_COMPILING_SECONDS = 0.005
# While only stored prefixes are read, reports are looked for this often.
_READING_SECONDS = 0.002
# A start waits so long for ranks to list the prefixes on their disks.
_STORE_SECONDS = 10.0
# The order of the requests that wait is told to the guard at most this often.
_ORDER_SECONDS = 0.5


class Engine:
    """Answers requests on the leader rank; not thread-safe, used by one thread."""

    def __init__(
        self,
        executor: Executor,
        followers: Followers,
        send: Callable[[Sequence[RankMessage]], None],
        *,
        size: int,
        context_length: int,
        concurrency: int,
        prefill_chunk_tokens: int,
        looks_ahead: bool = True,
        masks: Masks | None = None,
        speculation: choices.Speculation = "off",
    ) -> None:
        """Make an engine that refuses requests with grammars if it has no ``masks``.

        There is ``speculation`` only if every layer keeps plain keys and values, which can be cut
        back.
        """
        stages = size if executor.is_pipeline else 1
        self._executor = executor
        self._queue = StepQueue(executor, followers)
        self._agreement = Agreement(followers, size)
        self._send = send
        self._unsent: list[RankMessage] = []
        plain_caches = executor.stage.has_plain_caches
        self._table = RequestTable(
            self._queue,
            self._unsent.append,
            context_length=context_length,
            concurrency=concurrency,
            batches=stages,
            can_batch=executor.stage.can_batch,
            cuttable_caches=can_cut(executor.stage),
            masks=masks,
        )
        self._admission = Admission(self._table)
        self._masks = masks
        self._disk: DiskCache | None = None
        self._context_length = context_length
        self._prompts = PromptChunks(
            self._table,
            ChunkBounds(
                prefill_chunk_tokens,
                executor.stage.past_last - executor.stage.first,
                on_gpu=mx.default_device() == mx.gpu,
            ),
            stages=stages,
            computes_together=plain_caches,
        )
        self._stages = stages
        self._drafting = Drafting(speculation if plain_caches else "off", context_length)
        self._scheduler = Scheduler(
            self._table,
            self._admission,
            self._queue,
            self._prompts,
            self._drafting,
            self._agreement,
            stages=stages,
            looks_ahead=looks_ahead,
            prefill_chunk_tokens=prefill_chunk_tokens,
            before_chunk=self._send_all,
        )
        self._last_result = 0.0
        self._order_told = 0.0
        self._order: list[str] = []

    # --- what the worker calls -------------------------------------------------------------------

    @property
    def busy(self) -> bool:
        """True if there are requests or steps in flight."""
        return not self._table.empty or self._queue.computing > 0

    @property
    def speculates(self) -> bool:
        """True if steps may verify drafts."""
        return self._drafting.is_on

    def accept(self, message: Generate | Cancel) -> None:
        """Queue a request, or cancel one."""
        if isinstance(message, Generate):
            if self._masks is not None:
                self._masks.rows = self._executor.vocabulary
            self._table.enqueue(message)
        else:
            self._table.cancel(message.request_id)
        self._send_all()

    def advance(self) -> None:
        """Keep as many steps in flight as there are stages, and complete the oldest.

        Raises:
            ConnectionLost: if a follower is gone.
            ClusterError: if a follower's state differs from the leader's.
        """
        self._agreement.check()
        if self._disk is not None:
            self._disk.take_own_reports()
            self._table.read_stored(self._disk.reading, self._prompts.tokens_per_second)
            self._disk.writing.write_now_and_then()
        if self._masks is not None:
            self._masks.poll()
            self._table.end_masked()
        self._table.end_cancelled()
        quiet = [b for b in self._table.batches if not self._queue.decodes_of(b)]
        self._admission.admit(quiet)
        self._table.balance(quiet)
        self._tell_order()
        self._scheduler.start_steps()
        self._send_all()
        step = self._queue.build_next()
        if step is None:
            if self._disk is not None and self._disk.reading.is_reading:
                time.sleep(_READING_SECONDS)
            elif self._masks is not None and self._table.line and not self._table.admitted:
                self._masks.wait_for_news(_COMPILING_SECONDS)
            return
        if isinstance(step.decision, Decode):
            self._choose(step)
            self._scheduler.start_steps()  # its batch can now have a step ahead
        self._queue.complete()
        self._completed(step)
        # Send before building the next step: MLX may block that until most of it is computed.
        self._send_all()

    def _choose(self, step: Step) -> None:
        """Choose the tokens of the oldest step, if that was deferred until earlier ones are known.

        Its masks are computed while the device computes the step; wait for those that have not
        come.
        """
        if step.chosen is not None:
            return
        answers = [row.masked for row in step.rows if row.masked is not None and not row.ended]
        if answers and self._masks is not None:
            self._masks.wait(answers)
            self._table.end_masked()
        self._queue.choose(step)

    def _tell_order(self) -> None:
        """Tell the guard in which order the waiting requests would start, if that has changed."""
        now = time.monotonic()
        if not self._table.line or now - self._order_told < _ORDER_SECONDS:
            return
        order = self._table.line.order()
        if order:
            self._order_told = now
        if order and order != self._order:
            self._order = order
            self._unsent.append(WaitingOrder(order))

    def _send_all(self) -> None:
        """Send all pending messages to the guard at once, so that it wakes up only once."""
        if self._unsent:
            self._send(self._unsent)
            self._unsent.clear()

    @property
    def sender(self) -> StepQueue:
        """The queue that sends decisions to all ranks."""
        return self._queue

    @property
    def keeper(self) -> PrefixKeeper:
        """The prefixes that are kept in memory."""
        return self._table.keeper

    def use_disk_cache(self, disk: DiskCache, folder: str, limit_bytes: int) -> None:
        """Use the prefix cache on disk: let all ranks open their stores of this name.

        The blocks are known when all have looked what is there, which is waited for, but not long.
        """
        self._disk = disk
        self._agreement.on_store = disk.handle
        self.now(OpenStore(self.next_number, folder, limit_bytes))
        deadline = time.monotonic() + _STORE_SECONDS
        while not disk.blocks.ready and disk.blocks.usable and time.monotonic() < deadline:
            self.wait_for_answers()
            time.sleep(_READING_SECONDS)
            disk.take_own_reports()
            self._agreement.check()

    @property
    def has_idle_work(self) -> bool:
        """True if there is something to do while no request runs: prefixes to be stored."""
        return self._disk is not None and self._disk.writing.has_work

    def tick(self) -> None:
        """Tell the followers that there is nothing to do."""
        if self._disk is not None:
            self._disk.take_own_reports()
            self._table.read_stored(self._disk.reading, self._prompts.tokens_per_second)
            self._disk.writing.write_some()
        self._queue.build_next()  # carries out what is left: decisions that compute nothing
        self._agreement.check()
        self.now(Tick(self._queue.next_number))

    def quit(self) -> None:
        """Tell the followers to end."""
        self._send_all()
        self._queue.submit(Quit(self._queue.next_number))
        if self._masks is not None:
            self._masks.end()

    def now(self, decision: Decision) -> StepResult:
        """Carry out a decision on all ranks at once; only while nothing is in flight."""
        return self._queue.now(decision)

    def in_order(self, decisions: Iterable[Decision]) -> Iterator[tuple[Decision, StepResult]]:
        """Carry out decisions on all ranks, as many at once as there are stages.

        Only while nothing is in flight. A decision is taken when it is submitted, so its number may
        be ``next_number``. Yields those that compute something, with their results.
        """
        for decision in decisions:
            self._queue.submit(decision)
            if self._queue.computing >= self._stages:
                yield self._oldest()
        while self._queue.computing:
            yield self._oldest()
        self._queue.build_next()  # decisions that compute nothing may be left in a pipeline

    def _oldest(self) -> tuple[Decision, StepResult]:
        step = self._queue.build_next()
        assert step is not None
        assert step.result is not None
        self._queue.complete()
        return step.decision, step.result

    def wait_for_answers(self) -> None:
        """Record that this rank waits for messages of the followers."""
        self._executor.about_to_wait_for_messages()

    def forget_rates(self) -> None:
        """Forget how long chunks took: during the warm-up they took longer than they will."""
        self._prompts.forget_rates()

    def report_cache_use(self) -> None:
        """Tell the guard about the KV cache before the first request changes it."""
        self._table.report_cache_use()
        self._send_all()

    @property
    def next_number(self) -> int:
        """Number of the next decision."""
        return self._queue.next_number

    # --- completing steps ------------------------------------------------------------------------

    def _completed(self, step: Step) -> None:
        now = time.monotonic()
        match step.decision:
            case Prefill(tokens=tokens):
                self._prefilled(step, len(tokens))
            case PrefillTogether(tokens=prompts):
                self._prefilled(step, len(prompts) * max(map(len, prompts)))
            case Decode(step=number):
                assert step.result is not None
                if step.result.state_digest:
                    in_step = step.result.in_step is None or bool(step.result.in_step.item())
                    self._agreement.expect(number, step.result.state_digest, in_step=in_step)
                self._decoded(step, now)
                return
        self._last_result = now

    def _prefilled(self, step: Step, count: int) -> None:
        self._prompts.observe(count, step.seconds, step.waited_seconds)
        for row in step.rows:
            total = len(row.request.prompt)
            done = min(row.computed, total)
            # A prompt that is computed again after a pause is not reported again.
            if not row.ended and row.first_token_at is None and done >= row.reported:
                row.reported = done
                self._unsent.append(PromptProgress(row.request.request_id, done, total, row.cached))

    def _decoded(self, step: Step, now: float) -> None:
        assert step.chosen is not None
        self._executor.about_to_wait()
        tokens = cast(list[int], step.chosen.tolist())
        last_result, self._last_result = self._last_result, time.monotonic()
        seconds = self._last_result - last_result
        if step.drafts:
            self._verified(step, tokens, now, seconds)
            return
        if len(step.rows) == 1:
            self._measure(step, seconds)
        for index, (row, token) in enumerate(zip(step.rows, tokens, strict=True)):
            if row.ended:
                continue
            if row.failure is not None:
                self._table.fail(row)
            else:
                self._take(row, [token], step, index, now)

    def _measure(self, step: Step, seconds: float) -> None:
        """Note the time of an ordinary step of one row, with which drafts are compared."""
        row, decision = step.rows[0], step.decision
        assert isinstance(decision, Decode)
        usual = decision.ahead or not self._scheduler.is_built_ahead(decision.batch)
        self._drafting.decoded(row, seconds, usual=usual)

    def _verified(self, step: Step, tokens: list[int], now: float, seconds: float) -> None:
        """Apply a step that verified a draft: cut the rest of it from the caches, and go on."""
        (row,) = step.rows
        if row.ended:
            return  # the drafts were cut back as it ended
        if row.failure is not None:
            self._table.fail(row)
            return
        taken = self._drafting.accept(row, step.drafts, tokens, seconds)
        self._table.cut_back(row, len(tokens) - len(taken))
        self._table.line.charge(row, ANSWER_UNITS)
        self._take(row, taken, step, 0, now)

    def _take(
        self, row: Running, tokens: Sequence[int], step: Step, index: int, now: float
    ) -> None:
        """Append tokens to a request, and end it if the last one was its last.

        Args:
            index: the row of the logits from which the first one was chosen.
        """
        request = row.request
        if row.first_token_at is None:
            row.first_token_at = now
        row.generated += tokens
        stopped = tokens[-1] in request.stop_tokens
        sent = tokens[:-1] if stopped else tokens
        masked = row.masked
        assert step.logits is not None
        scores = []
        try:
            for number, token in enumerate(sent, start=index):
                if masked is not None and self._masks is not None:
                    self._masks.take(masked, token)
                logprob = row.sampler.logprob(step.logits[number], token)
                row.sampler.record(token)
                scores += [] if logprob is None else [logprob]
        except Exception as error:  # as in choose_tokens
            row.failure = error
            self._table.fail(row)
            return
        if sent:
            self._unsent.append(Tokens(request.request_id, list(sent), scores))
        if stopped:
            self._table.end(row, "stop")
            return
        full = len(request.prompt) + len(row.generated) >= self._context_length
        if full or len(row.generated) >= request.max_tokens:
            if masked is not None and self._masks is not None:
                self._masks.wait([masked])  # this token may have completed the answer
            self._table.end(row, "stop" if masked is not None and masked.complete else "length")
