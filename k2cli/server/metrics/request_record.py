"""Record of one HTTP request, from its header to the end of its response.

It has counts and times, and nothing of the prompt or the answer. The routes note what happens; the
totals are counted as it happens, so that rates are smooth while a long answer is generated.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Literal

from starlette.types import Scope

from k2cli.protocol import Paused, PromptProgress, Tokens
from k2cli.server.engine_client import EngineEvent
from k2cli.server.errors import ApiError
from k2cli.server.metrics.totals import Dialect, KeyTotals, Result, Totals
from k2cli.server.usage import AnswerUsage

Stage = Literal["reading", "queued", "prefill", "decode"]
"""``reading``: its body is received, and its prompt tokenized. ``queued``: the engine has not
started it."""

_SCOPE_NAME = "k2.record"
_DIALECTS: dict[str, Dialect] = {
    "/v1/chat/completions": "chat",
    "/v1/completions": "completions",
    "/v1/responses": "responses",
    "/v1/messages": "messages",
    "/v1/messages/count_tokens": "count_tokens",
    "/v1/tokenize": "tokenize",
}


def dialect_of(scope: Scope) -> Dialect:
    """Return the dialect of a request, by its route."""
    return _DIALECTS.get(scope["path"], "other") if scope["method"] == "POST" else "other"


@dataclass(slots=True, eq=False)
class RequestRecord:
    """One request. Times are of the monotonic clock; None for what has not happened.

    Attributes:
        id: of k2's own, short, and made of random digits.
        dialect: the form of the request.
        request_id: the value of the header ``X-Request-Id``.
        totals: counts what happens.
        key: the name of the key that the request has, empty if there are no named keys.
        engine_id: its id in the engine.
        prompt_done: tokens of the prompt that are computed or taken from the cache.
        generated_tokens: tokens that the engine has sent, also those after a stop string.
        completion_tokens: tokens of the answer, as ``usage`` counts them.
        draft_tokens: guessed tokens of a complete answer.
        accepted_tokens: of these, those that the model generated, too.
        finish_reason: set once the answer is complete.
        failure: status and code of the error that ended it after the response had begun.
    """

    id: str
    dialect: Dialect
    request_id: str
    totals: Totals
    key: str = ""
    began: float = field(default_factory=time.monotonic)
    stage: Stage = "reading"
    engine_id: str = ""
    queued_at: float | None = None
    admitted_at: float | None = None
    first_token_at: float | None = None
    last_token_at: float | None = None
    prompt_tokens: int = 0
    prompt_done: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    completion_tokens: int = 0
    draft_tokens: int = 0
    accepted_tokens: int = 0
    reasoning_tokens: int = 0
    pauses: int = 0
    finish_reason: str = ""
    failure: tuple[int, str] | None = None
    client_gone: bool = False

    @property
    def own_totals(self) -> KeyTotals:
        """The totals of its key."""
        return self.totals.of_key(self.key)

    @property
    def decode_tokens_per_second(self) -> float | None:
        """Rate of the tokens after the first one; None before there are two."""
        if self.first_token_at is None or self.last_token_at is None:
            return None
        seconds = self.last_token_at - self.first_token_at
        return (self.generated_tokens - 1) / seconds if seconds > 0 else None

    def tokens_per_second(self, now: float) -> float | None:
        """Return the rate of the tokens after the first one, which falls if no more come."""
        if self.first_token_at is None or now <= self.first_token_at:
            return None
        return (self.generated_tokens - 1) / (now - self.first_token_at)

    def note_received(self) -> None:
        """Begin to measure: a slow network is no time of the server."""
        self.began = time.monotonic()

    def note_submitted(self, engine_id: str, prompt_tokens: int) -> None:
        """Record that the request waits for the engine."""
        self.engine_id, self.prompt_tokens = engine_id, prompt_tokens
        self.stage, self.queued_at = "queued", time.monotonic()

    def note_event(self, event: EngineEvent) -> None:
        """Record what the engine sends, at the moment it comes."""
        now = time.monotonic()
        match event:
            case PromptProgress(done=done, total=total, cached=cached):
                self._note_admitted(now)
                self.prompt_tokens = total
                self._count_prompt(done, cached, now)
            case Tokens(tokens=tokens) if tokens:
                self._note_admitted(now)
                self._count_prompt(self.prompt_tokens, self.cached_tokens, now)
                self._note_tokens(len(tokens), now)
            case Paused():
                self.pauses += 1
                self.own_totals.pauses += 1
            case _:
                pass

    def _note_admitted(self, now: float) -> None:
        if self.admitted_at is None:
            self.stage, self.admitted_at = "prefill", now
            self.own_totals.queue_seconds.observe(now - (self.queued_at or self.began))

    def _note_tokens(self, count: int, now: float) -> None:
        if self.first_token_at is None or self.last_token_at is None:
            self.stage, self.first_token_at = "decode", now
            self.own_totals.first_token_seconds.observe(now - self.began)
        else:
            gap = (now - self.last_token_at) / count
            self.own_totals.inter_token_seconds.observe(gap, count)
        self.last_token_at = now
        self.generated_tokens += count
        self.totals.completion_rate.add(count, now)

    def _count_prompt(self, done: int, cached: int, now: float) -> None:
        more_cached = max(0, cached - self.cached_tokens)
        more = max(0, done - self.prompt_done)
        if more_cached and not self.cached_tokens:
            self.own_totals.cache_hits[self.dialect] += 1
        self.cached_tokens += more_cached
        self.prompt_done += more
        self.own_totals.cached_tokens[self.dialect] += more_cached
        self.own_totals.prompt_tokens[self.dialect] += more
        self.totals.prompt_rate.add(max(0, more - more_cached), now)

    def note_completion(self, tokens: int) -> None:
        """Record the length of the answer so far, in tokens."""
        more = max(0, tokens - self.completion_tokens)
        self.completion_tokens += more
        self.own_totals.completion_tokens[self.dialect] += more

    def note_ended(self, finish_reason: str, usage: AnswerUsage) -> None:
        """Record that the answer is complete."""
        self.finish_reason = finish_reason
        self.prompt_tokens = usage.prompt_tokens
        self._count_prompt(usage.prompt_tokens, usage.cached_tokens, time.monotonic())
        self.note_completion(usage.completion_tokens)
        self.reasoning_tokens = usage.reasoning_tokens
        self.own_totals.reasoning_tokens[self.dialect] += usage.reasoning_tokens
        self.draft_tokens, self.accepted_tokens = usage.draft_tokens, usage.accepted_tokens
        self.own_totals.draft_tokens[self.dialect] += usage.draft_tokens
        self.own_totals.accepted_tokens[self.dialect] += usage.accepted_tokens
        self.own_totals.answers[self.dialect, finish_reason] += 1

    def note_failure(self, error: ApiError) -> None:
        """Record an error after which the answer is not complete."""
        if self.failure is None:
            self.failure = error.status, error.code or ""

    def note_client_gone(self) -> None:
        """Record that the client has closed the connection."""
        self.client_gone = True

    def result(self, status: int) -> Result:
        """Classify the end of the request.

        Args:
            status: of the response.
        """
        if self.finish_reason:
            return "completed"
        if self.failure is not None:
            status = self.failure[0]
        elif self.client_gone or status == 499:
            return "client_gone"
        if status < 400:
            return "completed"
        if status in (401, 403):
            return "unauthorized"
        if status == 429 or (status in (503, 529) and self.stage == "reading"):
            return "refused"
        return "invalid" if status < 500 else "failed"


def attach(record: RequestRecord, scope: Scope) -> None:
    """Make a record the one of a request."""
    scope[_SCOPE_NAME] = record


def record_of(scope: Scope) -> RequestRecord:
    """Return the record of a request."""
    record: RequestRecord = scope[_SCOPE_NAME]
    return record
