"""Responses that send an answer while it is generated, or whitespace until it is whole.

Both keep the connection alive during a long prefill: proxies and clients close one that is silent
for long (Cline after 30 s, nginx after 60 s).
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Coroutine
from contextlib import aclosing
from typing import Any

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from k2cli.protocol import PromptProgress
from k2cli.server.dialects.writer import AnswerWriter
from k2cli.server.errors import ApiError, internal_error
from k2cli.server.generation import (
    AnswerEvent,
    ClientGone,
    Ended,
    Generation,
    Idle,
    Step,
    answer,
)
from k2cli.server.output.events import OutputParser
from k2cli.server.text_assembler import TextAssembler

_logger = logging.getLogger(__name__)

KEEP_ALIVE_SECONDS = 9.0
"""Silence after which a response sends something that clients skip; at most 10 s are promised."""


def _written(writer: AnswerWriter, event: AnswerEvent) -> bytes:
    match event:
        case Idle():
            return writer.idle(event)
        case PromptProgress():
            return writer.progress(event)
        case Step():
            return writer.step(event)
        case Ended():
            return writer.end(event)


async def event_stream(
    generation: Generation, assembler: TextAssembler, parser: OutputParser, writer: AnswerWriter
) -> AsyncGenerator[bytes]:
    """Yield the bytes of a stream, including the error that may end it."""
    last_sent = time.monotonic()
    try:
        async with aclosing(answer(generation, assembler, parser)) as events:
            async for event in events:
                data = _written(writer, event)
                if not data and time.monotonic() - last_sent >= KEEP_ALIVE_SECONDS:
                    data = writer.keep_alive
                if data:
                    last_sent = time.monotonic()
                    yield data
    except ApiError as error:
        yield writer.error(error)
    except ClientGone:
        return
    except Exception as error:
        # The client must learn that the answer is incomplete; uvicorn logs the traceback.
        yield writer.error(generation.failed(internal_error(error)))
        raise


class EventStreamResponse(Response):
    """Response that sends a stream and always closes its generation."""

    media_type = "text/event-stream"

    def __init__(self, generation: Generation, stream: AsyncGenerator[bytes]) -> None:
        self._generation = generation
        self._stream = stream
        self.status_code = 200
        self.background = None
        self.init_headers({"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the response. The generation itself watches for the client to disconnect."""
        try:
            start = {"status": self.status_code, "headers": self.raw_headers}
            await send({"type": "http.response.start", **start})
            async with aclosing(self._stream) as stream:
                async for data in stream:
                    await send({"type": "http.response.body", "body": data, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            await self._generation.close()


class SlowAnswerResponse(Response):
    """Response whose JSON is preceded by spaces, which are sent while it is not complete.

    The status is 200 from the first space on, so a later failure is a JSON object with ``error``.
    """

    media_type = "application/json"

    def __init__(
        self, generation: Generation, answering: asyncio.Task[dict[str, Any]], writer: AnswerWriter
    ) -> None:
        self._generation = generation
        self._answering = answering
        self._writer = writer
        self.status_code = 200
        self.background = None
        self.init_headers({"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send spaces, then the answer. The generation watches for the client to disconnect."""
        try:
            start = {"status": self.status_code, "headers": self.raw_headers}
            await send({"type": "http.response.start", **start})
            done: set[asyncio.Task[dict[str, Any]]] = set()
            while not done:
                await send({"type": "http.response.body", "body": b" ", "more_body": True})
                done, _ = await asyncio.wait([self._answering], timeout=KEEP_ALIVE_SECONDS)
            body = msgspec.json.encode(self._document())
            await send({"type": "http.response.body", "body": body, "more_body": False})
        finally:
            self._answering.cancel()
            await asyncio.gather(self._answering, return_exceptions=True)
            await self._generation.close()

    def _document(self) -> dict[str, Any]:
        error = self._answering.exception()
        match error:
            case None:
                return self._answering.result()
            case ClientGone():
                return {}
            case ApiError():
                return self._writer.error_object(error)
            case Exception():
                _logger.error("an answer failed", exc_info=error)
                failed = self._generation.failed(internal_error(error))
                return self._writer.error_object(failed)
            case _:
                raise error


async def answer_or_wait(
    generation: Generation, answering: Coroutine[Any, Any, dict[str, Any]], writer: AnswerWriter
) -> dict[str, Any] | SlowAnswerResponse:
    """Return the answer if it comes soon, and else the response that waits for it.

    Raises:
        ApiError, ClientGone: if the answer fails soon.
    """
    task = asyncio.create_task(answering)
    try:
        done, _ = await asyncio.wait([task], timeout=KEEP_ALIVE_SECONDS)
    except BaseException:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        raise
    return task.result() if done else SlowAnswerResponse(generation, task, writer)
