"""Limits of one client of the API: requests at a time, requests that wait, tokens per minute.

The limit on requests is exact: one that is beyond it waits here, and the engine never sees it. The
limit on tokens is one on the rate. A request is let in while the balance, less the prompts of
requests that have not begun, is above zero; what it computes is taken from the balance as it is
computed. So the balance may go below zero, by what the requests of that moment compute, and then
nothing is let in until the minutes have made up for it. Tokens that came from a cache are free.
Reserving the most that a request may need would instead refuse agents, whose prompts are nearly all
cached and whose limit for the answer is a constant far above what they use.

Requests of a key that wait here are in the same fair order of its conversations as those that wait
in the engine.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Sequence

from k2cli.fair_queue import ANSWER_UNITS, FairQueue, Ticket
from k2cli.protocol import KeyLimits

MAX_QUEUED = 256
"""Requests of a key without a limit of its own that wait for others of the key."""

LEAST_RETRY_SECONDS = 1
CONCURRENCY_RETRY_SECONDS = 5
"""Proposed pause of a client whose requests are all running: nobody knows when one will end."""


class TokenBucket:
    """Tokens that a key may use now: they come back at a rate, up to those of one minute.

    Args:
        per_minute: tokens.
        clock: returns seconds.
    """

    def __init__(self, per_minute: int, clock: Callable[[], float]) -> None:
        self.per_minute = per_minute
        self._clock = clock
        self._level = float(per_minute)
        self._at = clock()

    @property
    def level(self) -> float:
        """The tokens that are left, below zero if more were used than there were."""
        now = self._clock()
        self._level = min(self._level + (now - self._at) * self._rate, float(self.per_minute))
        self._at = now
        return self._level

    @property
    def _rate(self) -> float:
        return self.per_minute / 60

    def take(self, tokens: int) -> None:
        """Take tokens that were used; a negative number gives some back."""
        self._level = min(self.level - tokens, float(self.per_minute))

    def seconds_until(self, level: float) -> float:
        """Return the time after which the level is reached if no more tokens are used."""
        return max(0.0, (level - self.level) / self._rate)


Place = Ticket[asyncio.Future[None] | None]
"""The place of a request among those of its client."""


class LimitReached(Exception):
    """Error for a request that is beyond a limit; the message is for the client."""

    def __init__(self, message: str, retry_seconds: int) -> None:
        super().__init__(message)
        self.message = message
        self.retry_seconds = retry_seconds


class Usage:
    """The use that one client makes of its limits. Use it from one event loop only.

    Args:
        limits: of the client's key.
        clock: returns seconds.
    """

    def __init__(self, limits: KeyLimits, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self.running = 0
        """Requests that the engine has, at most ``max_concurrent``."""
        self._reserved_tokens = 0
        self._queue: FairQueue[asyncio.Future[None] | None] = FairQueue()
        self._bucket: TokenBucket | None = None
        self.limits = KeyLimits()
        self.set_limits(limits)

    def set_limits(self, limits: KeyLimits) -> None:
        """Apply other limits from now on; requests that run or wait stay."""
        if limits.tokens_per_minute != self.limits.tokens_per_minute:
            per_minute = limits.tokens_per_minute
            self._bucket = TokenBucket(per_minute, self._clock) if per_minute else None
        self.limits = limits
        self._start_waiting()

    @property
    def waiting(self) -> int:
        """Requests that wait until one of the client's own ends."""
        return len(self._queue)

    def admit(
        self, prompt_tokens: int, prompt: Sequence[int] = (), max_tokens: int = 1
    ) -> Admission:
        """Let a request in: it may start, or waits for another one of the client.

        Args:
            prompt_tokens: length of the prompt.
            prompt: its tokens, by which conversations are told apart.
            max_tokens: limit of the answer; short requests pass others.

        Raises:
            LimitReached: if it is beyond a limit.
        """
        self._check_tokens()
        most = self.limits.max_concurrent
        if most is None or (self.running < most and not self.waiting):
            self.running += 1
            ticket = self._queue.join(None, "", prompt, max_tokens)
            self._queue.start(ticket)
            return Admission(self, prompt_tokens, ticket)
        queued = self.limits.max_queued
        places = MAX_QUEUED if queued is None else queued
        if self.waiting >= places:
            raise LimitReached(
                f"requests of this key: {self.running} running and {self.waiting} waiting; "
                f"it may have {most} and {places}",
                CONCURRENCY_RETRY_SECONDS,
            )
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        ticket = self._queue.join(turn, "", prompt, max_tokens)
        return Admission(self, prompt_tokens, ticket)

    def _check_tokens(self) -> None:
        bucket = self._bucket
        if bucket is None or bucket.level - self._reserved_tokens > 0:
            return
        seconds = bucket.seconds_until(self._reserved_tokens + 1)
        message = f"this key may use {bucket.per_minute} tokens per minute"
        if bucket.level <= 0:
            message += f", and has used {math.ceil(-bucket.level)} more than that"
        else:
            message += (
                f", and {self._reserved_tokens} are set aside for its requests that wait; "
                f"{math.floor(bucket.level)} are left"
            )
            # Most of them may turn out to be cached, once those requests begin.
            seconds = min(seconds, CONCURRENCY_RETRY_SECONDS)
        raise LimitReached(message, max(LEAST_RETRY_SECONDS, math.ceil(seconds)))

    def headers(self) -> dict[str, str]:
        """Return OpenAI's headers with the limits that there are and what is left of them."""
        found: dict[str, str] = {}
        if (most := self.limits.max_concurrent) is not None:
            found["x-ratelimit-limit-requests"] = str(most)
            found["x-ratelimit-remaining-requests"] = str(max(0, most - self.running))
        if (bucket := self._bucket) is not None:
            left = math.floor(bucket.level - self._reserved_tokens)
            found["x-ratelimit-limit-tokens"] = str(bucket.per_minute)
            found["x-ratelimit-remaining-tokens"] = str(max(0, left))
            whole = bucket.seconds_until(float(bucket.per_minute))
            found["x-ratelimit-reset-tokens"] = f"{math.ceil(whole * 1000)}ms"
        return found

    # --- called by admissions -------------------------------------------------------------------

    def reserve(self, tokens: int) -> None:
        """Set tokens aside; a negative number ends that."""
        self._reserved_tokens += tokens

    def spend(self, tokens: int) -> None:
        """Take tokens that were computed from the balance."""
        if self._bucket is not None:
            self._bucket.take(tokens)

    def charge(self, ticket: Place, units: int) -> None:
        """Count work for a request, for the order of those that wait."""
        self._queue.charge(ticket, units)

    def pass_on(self, ticket: Place) -> None:
        """Give the place of a request that has ended to the next one."""
        self._queue.end(ticket)
        self.running -= 1
        self._start_waiting()

    def _start_waiting(self) -> None:
        most = self.limits.max_concurrent
        while len(self._queue) and (most is None or self.running < most):
            ticket = next(self._queue.in_order())
            turn = ticket.item
            if turn is None or turn.done():
                self._queue.leave(ticket)
                continue
            self._queue.start(ticket)
            self.running += 1
            turn.set_result(None)

    def leave(self, ticket: Place) -> None:
        """Remove a request that waits. Idempotent."""
        if ticket in self._queue:
            self._queue.leave(ticket)


class Admission:
    """One request that was let in. Always call ``close``.

    Args:
        usage: of the client.
        prompt_tokens: length of the prompt.
        ticket: its place. The item is done when a request that has to wait may start, and None for
            one that may at once.
    """

    def __init__(self, usage: Usage, prompt_tokens: int, ticket: Place) -> None:
        self._usage = usage
        self._ticket = ticket
        self._turn = ticket.item
        self._prompt_tokens = prompt_tokens
        self._reserved_tokens = 0
        self._charged_tokens = 0
        self._is_open = True
        self._reserve(prompt_tokens)

    @property
    def waits(self) -> bool:
        """True if the request may not start yet."""
        return self._turn is not None and not self._turn.done()

    @property
    def is_closed(self) -> bool:
        """True once ``close`` was called."""
        return not self._is_open

    async def wait_for_turn(self) -> None:
        """Wait until the request may start, or is closed."""
        if self._turn is not None:
            await self._turn

    def prompt_computed(self, tokens: int, cached_tokens: int) -> None:
        """Count the prompt: ``tokens`` of it are done, ``cached_tokens`` of them were kept."""
        self._reserve(self._prompt_tokens - tokens)
        self._charge(tokens - cached_tokens - self._charged_tokens)

    def generated(self, tokens: int) -> None:
        """Count tokens of the answer; the prompt is computed then."""
        self._reserve(0)
        self._charge(tokens, ANSWER_UNITS)

    def finished(self, computed_tokens: int) -> None:
        """Correct the count to what the engine reports at the end."""
        self._charge(computed_tokens - self._charged_tokens)

    def _reserve(self, tokens: int) -> None:
        self._usage.reserve(tokens - self._reserved_tokens)
        self._reserved_tokens = tokens

    def _charge(self, tokens: int, units_per_token: int = 1) -> None:
        self._charged_tokens += tokens
        self._usage.spend(tokens)
        if self._is_open and not self.waits:
            self._usage.charge(self._ticket, tokens * units_per_token)

    def close(self) -> None:
        """Give the place to the next request. Idempotent."""
        if not self._is_open:
            return
        self._is_open = False
        self._reserve(0)
        if self._turn is None or (self._turn.done() and not self._turn.cancelled()):
            self._usage.pass_on(self._ticket)
        else:
            self._usage.leave(self._ticket)
            if not self._turn.done():
                self._turn.set_result(None)  # whoever waits for it sees that it was closed
