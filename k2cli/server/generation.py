"""One request in flight: the engine's events for it, and what becomes of them if anybody leaves.

Three things can end a request early: the client goes away, a stop string is complete, or the run
ends underneath. The first two cancel it in the engine at once, whatever the response is doing at
that moment; the third becomes an error for the client. Events pass through a queue, so that
reading them can time out without losing one, and a slow client never holds the engine up.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import Any

from starlette.types import Receive

from k2cli.protocol import Finished, PromptProgress, RequestFailed, Tokens
from k2cli.server.engine_client import EngineClient, EngineEvent, EngineUnavailable
from k2cli.server.engine_request import EngineRequest
from k2cli.server.errors import engine_failure, unavailable
from k2cli.server.text import Piece, TextAssembler
from k2cli.server.usage import usage

IDLE_SECONDS = 1.0
# After a cancel the engine still sends its account of the request, within a step.
FINISHED_SECONDS = 5.0


class ClientGone(Exception):
    """Nobody is there any more to answer to."""


@dataclass(slots=True)
class RequestQueue:
    """Requests that the engine has not begun with, oldest first."""

    _requests: dict[str, None] = field(default_factory=dict)

    def join(self, request_id: str) -> None:
        """Stand at the end."""
        self._requests[request_id] = None

    def leave(self, request_id: str) -> None:
        """The engine has begun, or the request is over."""
        self._requests.pop(request_id, None)

    def position(self, request_id: str) -> int | None:
        """1 for the next in line; None for a request that is not waiting."""
        for index, waiting in enumerate(self._requests, start=1):
            if waiting == request_id:
                return index
        return None


class Generation:
    """The events of one request. ``start`` it, read with ``next``, and always ``close`` it."""

    def __init__(
        self, engine: EngineClient, request: EngineRequest, waiting: RequestQueue, receive: Receive
    ) -> None:
        self.request = request
        self._engine = engine
        self._waiting = waiting
        self._receive = receive
        self._id = request.generate.request_id
        self._queue: asyncio.Queue[EngineEvent | Exception] = asyncio.Queue()
        self._peeked: EngineEvent | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._over = False
        self._cancelled = False

    def start(self) -> None:
        """Submit the request, and watch for the client to leave."""
        self._waiting.join(self._id)
        self._tasks = [
            asyncio.create_task(self._pump(), name=f"generation {self._id}"),
            asyncio.create_task(self._watch_client(), name=f"client of {self._id}"),
        ]

    async def _pump(self) -> None:
        try:
            async for event in self._engine.submit(self.request.generate):
                self._waiting.leave(self._id)
                self._over = isinstance(event, Finished | RequestFailed)
                self._queue.put_nowait(event)
            if not self._over:
                raise EngineUnavailable("the engine broke off the answer")
        except Exception as error:
            # Raised again by ``next``, in the task that answers the client.
            self._over = self._over or isinstance(error, EngineUnavailable)
            self._queue.put_nowait(error)
        finally:
            self._waiting.leave(self._id)

    async def _watch_client(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self.cancel()
        self._queue.put_nowait(ClientGone())

    @property
    def queue_position(self) -> int | None:
        """Place in the line of requests that wait; None once the engine has begun."""
        return self._waiting.position(self._id)

    async def next(self, timeout_seconds: float = IDLE_SECONDS) -> EngineEvent | None:
        """The next event, or None if none came in time.

        Raises:
            ApiError: if the run is gone, or this request failed in the engine.
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
                raise unavailable(cause) from received
            case RequestFailed():
                raise engine_failure(received)
            case Exception():
                raise received
            case _:
                return received

    async def wait_for_first_event(self, timeout_seconds: float = IDLE_SECONDS) -> None:
        """Wait a little for the first event, so that a refusal can still become an HTTP status.

        Raises:
            ApiError, ClientGone: as ``next``.
        """
        self._peeked = await self.next(timeout_seconds)

    def cancel(self) -> None:
        """Tell the engine, once, that the rest is not wanted."""
        if not self._over and not self._cancelled:
            self._cancelled = True
            self._engine.cancel(self._id)

    async def wait_for_finished(self) -> Finished | None:
        """After ``cancel``: the engine's last word about this request, if it comes in time."""
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
        """Cancel what still runs, in the engine and here. Idempotent."""
        self.cancel()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._waiting.leave(self._id)


@dataclass(frozen=True, slots=True)
class Idle:
    """Nothing has happened for a while. ``queue_position`` is None once the engine has begun."""

    queue_position: int | None


@dataclass(frozen=True, slots=True)
class Ended:
    """The answer is complete."""

    finish_reason: str
    usage: dict[str, Any]


AnswerEvent = Idle | PromptProgress | Piece | Ended


async def answer(generation: Generation, assembler: TextAssembler) -> AsyncGenerator[AnswerEvent]:
    """What happens to an answer, as text: any number of events, the last one ``Ended``.

    Raises:
        ApiError: if the run is gone, or this request failed in the engine.
        ClientGone: if the client closed the connection.
    """
    while True:
        match await generation.next():
            case None:
                yield Idle(generation.queue_position)
            case PromptProgress() as progress:
                yield progress
            case Tokens(tokens=tokens, logprobs=logprobs):
                yield assembler.push(tokens, logprobs)
                if assembler.stopped:
                    yield await _stopped(generation, assembler)
                    return
            case Finished(reason="cancelled"):
                raise unavailable("the request was cancelled by the engine")
            case Finished() as finished:
                rest = assembler.finish()
                if rest.text or rest.scores:
                    yield rest
                yield _ended(finished, assembler)
                return


def _ended(finished: Finished, assembler: TextAssembler) -> Ended:
    reason = "stop" if assembler.stopped else finished.reason
    return Ended(reason, usage(finished, finished.prompt_tokens, finished.completion_tokens))


async def _stopped(generation: Generation, assembler: TextAssembler) -> Ended:
    """A stop string is complete: the engine need not go on."""
    generation.cancel()
    finished = await generation.wait_for_finished()
    prompt_tokens = len(generation.request.generate.prompt)
    return Ended("stop", usage(finished, prompt_tokens, assembler.tokens_used))
