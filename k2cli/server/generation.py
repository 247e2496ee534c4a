"""One request in flight: its events from the engine, and its cancellation.

Four things can end a request early: the client disconnects, a stop string is complete, the only
call that the client allows is complete, or the run ends. The first three cancel the request in the
engine at once, whatever the response is doing at that moment; the last becomes an error for the
client. Events pass through a queue, so that a read can
time out without losing one, and a slow client never blocks the engine.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from starlette.types import Receive

from k2cli.protocol import Finished, Paused, PromptProgress, RequestFailed, Tokens
from k2cli.server.engine_client import (
    EngineClient,
    EngineEvent,
    EngineUnavailable,
    RequestQueue,
)
from k2cli.server.engine_request import EngineRequest
from k2cli.server.errors import ApiError, engine_failure, unavailable
from k2cli.server.metrics.request_record import RequestRecord
from k2cli.server.output.events import CallEnded, OutputEvent, OutputParser
from k2cli.server.text_assembler import TextAssembler
from k2cli.server.usage import AnswerUsage

IDLE_SECONDS = 1.0
# After a cancel the engine still sends Finished for the request, within a step.
FINISHED_SECONDS = 5.0


class ClientGone(Exception):
    """Error raised when the client has closed the connection."""


class Generation:
    """The events of one request. Call ``start``, read with ``next``, and always call ``close``."""

    def __init__(
        self,
        engine: EngineClient,
        request: EngineRequest,
        waiting: RequestQueue,
        receive: Receive,
        record: RequestRecord,
        on_close: Callable[[], None] = lambda: None,
    ) -> None:
        self.request = request
        self.record = record
        self._engine = engine
        self._waiting = waiting
        self._receive = receive
        self._on_close = on_close
        self._id = request.generate.request_id
        self._queue: asyncio.Queue[EngineEvent | Exception] = asyncio.Queue()
        self._peeked: EngineEvent | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._over = False
        self._cancelled = False

    def start(self) -> None:
        """Submit the request, and watch for the client to disconnect."""
        self._waiting.join(self._id)
        self.record.note_submitted(self._id, len(self.request.generate.prompt))
        self._tasks = [
            asyncio.create_task(self._pump(), name=f"generation {self._id}"),
            asyncio.create_task(self._watch_client(), name=f"client of {self._id}"),
        ]

    async def _pump(self) -> None:
        try:
            async for event in self._engine.submit(self.request.generate):
                self._waiting.leave(self._id)
                self.record.note_event(event)
                if isinstance(event, Paused):
                    continue  # its stream stands still
                self._over = isinstance(event, Finished | RequestFailed)
                self._queue.put_nowait(event)
            if not self._over:
                raise EngineUnavailable("the engine stopped before the answer was complete")
        except Exception as error:
            # ``next`` raises it again in the task that answers the client.
            self._over = self._over or isinstance(error, EngineUnavailable)
            self._queue.put_nowait(error)
        finally:
            self._waiting.leave(self._id)

    async def _watch_client(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self.record.note_client_gone()
        self.cancel()
        self._queue.put_nowait(ClientGone())

    @property
    def queue_position(self) -> int | None:
        """Position among the waiting requests; None once the engine has started this one."""
        return self._waiting.position(self._id)

    async def next(self, timeout_seconds: float = IDLE_SECONDS) -> EngineEvent | None:
        """Return the next event, or None if none came in time.

        Raises:
            ApiError: if the run has ended, or this request failed in the engine.
            ClientGone: if the client closed the connection.
        """
        if self._peeked is not None:
            event, self._peeked = self._peeked, None
            return event
        try:
            async with asyncio.timeout(timeout_seconds):
                received = await self._queue.get()
        except TimeoutError:
            return None
        match received:
            case EngineUnavailable(cause=cause):
                raise self.failed(unavailable(cause)) from received
            case RequestFailed():
                raise self.failed(engine_failure(received))
            case Exception():
                raise received
            case _:
                return received

    def failed(self, error: ApiError) -> ApiError:
        """Record the error that ends the answer, and return it."""
        self.record.note_failure(error)
        return error

    async def wait_for_first_event(self, timeout_seconds: float = IDLE_SECONDS) -> None:
        """Wait briefly for the first event, so that a refusal can still become an HTTP status.

        Raises:
            ApiError, ClientGone: like ``next``.
        """
        self._peeked = await self.next(timeout_seconds)

    def cancel(self) -> None:
        """Cancel the request in the engine, once."""
        if not self._over and not self._cancelled:
            self._cancelled = True
            self._engine.cancel(self._id)

    def fail(self, error: ApiError) -> None:
        """End the request with an error at once: what is not sent yet is dropped."""
        self.cancel()
        self._over, self._peeked = True, None
        while not self._queue.empty():
            self._queue.get_nowait()
        self._queue.put_nowait(self.failed(error))

    async def wait_for_finished(self) -> Finished | None:
        """Return the engine's last event after ``cancel``, if it comes in time."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(FINISHED_SECONDS):
                while True:
                    event = await self._queue.get()
                    if isinstance(event, Finished):
                        return event
                    if isinstance(event, RequestFailed | Exception):
                        return None
        return None

    async def close(self) -> None:
        """Cancel the request in the engine and all tasks here. Idempotent."""
        self.cancel()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._waiting.leave(self._id)
        self._on_close()


@dataclass(frozen=True, slots=True)
class Idle:
    """Event for a while without news. ``queue_position`` is None once the engine has started."""

    queue_position: int | None


@dataclass(frozen=True, slots=True)
class Step:
    """Event for new tokens. ``events`` may be empty while text is held back."""

    events: Sequence[OutputEvent]
    completion_tokens: int


FinishReason = Literal["stop", "length", "tool_calls"]


@dataclass(frozen=True, slots=True)
class Ended:
    """Last event of a complete answer. ``stop_string`` is the one that ended it, if one did."""

    finish_reason: FinishReason
    usage: AnswerUsage
    stop_string: str | None = None


AnswerEvent = Idle | PromptProgress | Step | Ended


async def answer(
    generation: Generation, assembler: TextAssembler, parser: OutputParser
) -> AsyncGenerator[AnswerEvent]:
    """Yield the events of an answer, with tokens turned into its parts; the last is ``Ended``.

    Raises:
        ApiError: if the run has ended, or this request failed in the engine.
        ClientGone: if the client closed the connection.
    """
    calls_ended = 0
    while True:
        match await generation.next():
            case None:
                yield Idle(generation.queue_position)
            case PromptProgress() as progress:
                yield progress
            case Tokens(tokens=tokens, logprobs=logprobs):
                events = parser.push(assembler.push(tokens, logprobs))
                if assembler.stopped:
                    events += parser.finish()
                events, is_last_call = _allowed(events, generation.request)
                generation.record.note_completion(assembler.tokens_used)
                calls_ended += _count_ended(events)
                yield Step(events, assembler.tokens_used)
                if assembler.stopped or is_last_call:
                    # A stop string within a call leaves a call that cannot be made.
                    calls = is_last_call or 0 < parser.calls == calls_ended
                    ended = await _stopped(generation, assembler, parser, called=calls)
                    generation.record.note_ended(ended.finish_reason, ended.usage)
                    yield ended
                    return
            case Finished(reason="cancelled"):
                raise generation.failed(unavailable("the request was cancelled by the engine"))
            case Finished() as finished:
                rest = [*parser.push(assembler.finish()), *parser.finish()]
                rest, _ = _allowed(rest, generation.request)
                if rest:
                    yield Step(rest, assembler.tokens_used)
                ended = _ended(generation, finished, assembler, parser)
                generation.record.note_ended(ended.finish_reason, ended.usage)
                yield ended
                return


def _allowed(events: list[OutputEvent], request: EngineRequest) -> tuple[list[OutputEvent], bool]:
    """Cut the events after the first call if the client allows only one; True if it is complete."""
    if not request.output.parallel_calls:
        for number, event in enumerate(events, start=1):
            if isinstance(event, CallEnded):
                return events[:number], True
    return events, False


def _count_ended(events: Sequence[OutputEvent]) -> int:
    return sum(isinstance(event, CallEnded) for event in events)


def _ended(
    generation: Generation, finished: Finished, assembler: TextAssembler, parser: OutputParser
) -> Ended:
    reason: FinishReason = "length" if finished.reason == "length" else "stop"
    if assembler.stopped:
        reason = "stop"
    if reason == "stop" and parser.calls:
        reason = "tool_calls"
    used = AnswerUsage(
        finished.prompt_tokens,
        finished.completion_tokens,
        parser.reasoning_tokens,
        _cut_limit(generation),
        finished,
    )
    return Ended(reason, used, assembler.stop_string)


async def _stopped(
    generation: Generation, assembler: TextAssembler, parser: OutputParser, *, called: bool
) -> Ended:
    """Cancel the rest of the answer after a complete stop string, or the only call allowed."""
    generation.cancel()
    finished = await generation.wait_for_finished()
    used = AnswerUsage(
        len(generation.request.generate.prompt),
        assembler.tokens_used,
        parser.reasoning_tokens,
        _cut_limit(generation),
        finished,
    )
    return Ended("tool_calls" if called else "stop", used, assembler.stop_string)


def _cut_limit(generation: Generation) -> int | None:
    request = generation.request
    return request.generate.max_tokens if request.limit_was_cut else None
