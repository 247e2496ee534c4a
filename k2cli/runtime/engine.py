"""The leader's scheduler: which request runs, in which steps, and what becomes of it.

One request at a time, in the order in which they came: prefill in chunks, then one token per
step. Every step is decided here, sent to the followers and carried out on this rank too. Between
any two steps the inbox is looked at, so a cancellation takes effect within one step. An error
inside one request's sampling ends that request and no other.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx

from k2cli.runtime.control import Followers
from k2cli.runtime.executor import Executor, StepResult
from k2cli.runtime.protocol import (
    Cancel,
    CloseSequence,
    Decision,
    Finished,
    FinishReason,
    Forward,
    Generate,
    OpenSequence,
    PromptProgress,
    Quit,
    RankMessage,
    RequestFailed,
    Tick,
    Tokens,
)
from k2cli.runtime.sampling import Sampler


@dataclass(slots=True)
class _Running:
    """The request that runs now. Times are of the monotonic clock."""

    request: Generate
    sequence: int
    sampler: Sampler
    queued_at: float
    started_at: float
    first_token_at: float | None = None
    computed: int = 0
    generated: int = 0
    next_token: int | None = None
    cancelled: bool = False


class Engine:
    """Serves requests on the leader rank; not thread-safe, everything happens in one thread."""

    def __init__(
        self,
        executor: Executor,
        followers: Followers,
        send: Callable[[RankMessage], None],
        *,
        context_length: int,
        prefill_chunk_tokens: int,
    ) -> None:
        self._executor = executor
        self._followers = followers
        self._send = send
        self._context_length = context_length
        self._chunk = prefill_chunk_tokens
        self._waiting: deque[tuple[Generate, float]] = deque()
        self._running: _Running | None = None
        self._step = 0
        self._next_sequence = 0

    @property
    def busy(self) -> bool:
        """Whether there is work."""
        return self._running is not None or bool(self._waiting)

    def accept(self, message: Generate | Cancel) -> None:
        """Take a request, or its cancellation, into account."""
        if isinstance(message, Generate):
            self._waiting.append((message, time.monotonic()))
            return
        if self._running is not None and self._running.request.request_id == message.request_id:
            self._running.cancelled = True
            return
        for entry in self._waiting:
            if entry[0].request_id == message.request_id:
                self._waiting.remove(entry)
                self._report_cancelled_in_queue(*entry)
                return

    def advance(self) -> None:
        """Do one step of work."""
        if self._running is None:
            self._admit()
            return
        running = self._running
        if running.cancelled:
            self._end("cancelled")
        elif running.computed < len(running.request.prompt) - 1:
            self._prefill(running)
        else:
            self._decode(running)

    def tick(self) -> None:
        """Tell the followers that nothing is to be done."""
        self.decide(Tick(self._next_step()))

    def quit(self) -> None:
        """Tell the followers to end."""
        self.decide(Quit(self._next_step()))

    def decide(self, decision: Decision) -> StepResult:
        """Send a decision to the followers and carry it out here.

        Raises:
            ConnectionLost: if a follower is gone.
        """
        self._followers.send(decision)
        return self._executor.carry_out(decision)

    def forward(
        self, sequence: int, tokens: list[int], *, last: bool, digest: bool = False
    ) -> StepResult:
        """Run tokens through all stages."""
        return self.decide(Forward(self._next_step(), sequence, tokens, last, digest))

    def open_sequence(self) -> int:
        """A fresh KV cache on every rank."""
        self._next_sequence += 1
        self.decide(OpenSequence(self._next_step(), self._next_sequence))
        return self._next_sequence

    def close_sequence(self, sequence: int) -> None:
        """Drop a KV cache on every rank."""
        self.decide(CloseSequence(self._next_step(), sequence))

    @property
    def last_step(self) -> int:
        """The number of the step that was decided last."""
        return self._step

    def _next_step(self) -> int:
        self._step += 1
        return self._step

    def _admit(self) -> None:
        request, queued_at = self._waiting.popleft()
        if len(request.prompt) >= self._context_length or not request.prompt:
            error = (
                f"the prompt has {len(request.prompt)} tokens, "
                f"the context holds {self._context_length}"
            )
            self._send(RequestFailed(request.request_id, error, "invalid"))
            return
        sequence = self.open_sequence()
        sampler = Sampler(request.sampling, request.prompt)
        now = time.monotonic()
        self._running = _Running(request, sequence, sampler, queued_at, now)

    def _prefill(self, running: _Running) -> None:
        """All of the prompt but its last token, a chunk per step: only the cache matters."""
        prompt = running.request.prompt
        past = min(running.computed + self._chunk, len(prompt) - 1)
        self.forward(running.sequence, prompt[running.computed : past], last=False)
        running.computed = past
        self._send(PromptProgress(running.request.request_id, past, len(prompt)))

    def _decode(self, running: _Running) -> None:
        token = running.next_token
        if token is None:
            token = running.request.prompt[-1]
        result = self.forward(running.sequence, [token], last=True)
        running.computed += 1
        assert result.logits is not None
        self._choose(running, result.logits)

    def _choose(self, running: _Running, logits: mx.array) -> None:
        request = running.request
        try:
            token, logprob = running.sampler.choose(logits)
        except Exception as error:  # whatever it is, it must not reach another request
            self._close(running)
            self._send(RequestFailed(request.request_id, f"sampling failed: {error}"))
            return
        if running.first_token_at is None:
            running.first_token_at = time.monotonic()
        if token in request.stop_tokens:
            self._end("stop")
            return
        running.next_token = token
        running.generated += 1
        logprobs = [] if logprob is None else [logprob]
        self._send(Tokens(request.request_id, [token], logprobs))
        full = len(request.prompt) + running.generated >= self._context_length
        if full or running.generated >= request.max_tokens:
            self._end("length")

    def _close(self, running: _Running) -> None:
        self.close_sequence(running.sequence)
        self._running = None

    def _end(self, reason: FinishReason) -> None:
        running = self._running
        assert running is not None
        now = time.monotonic()
        first = running.first_token_at or now
        self._close(running)
        self._send(
            Finished(
                running.request.request_id,
                reason,
                prompt_tokens=len(running.request.prompt),
                completion_tokens=running.generated,
                cached_tokens=0,
                queue_seconds=running.started_at - running.queued_at,
                prefill_seconds=first - running.started_at,
                decode_seconds=now - first,
            )
        )

    def _report_cancelled_in_queue(self, request: Generate, queued_at: float) -> None:
        waited = time.monotonic() - queued_at
        self._send(
            Finished(request.request_id, "cancelled", len(request.prompt), 0, 0, waited, 0.0, 0.0)
        )
