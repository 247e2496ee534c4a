"""Answers as server-sent events.

A stream consists of chunks with text, one with the finish reason, one with the usage if asked for,
and ``[DONE]``. With ``include_progress`` it also has ``"k2"`` objects: the position in the queue,
the prompt tokens computed, and the number of tokens generated, which comes with every step even
while text is held back. An error after the headers are sent is an ``error`` event, and the stream
ends without ``[DONE]``.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from k2cli.protocol import PromptProgress
from k2cli.server.engine_request import EngineRequest
from k2cli.server.errors import ApiError
from k2cli.server.generation import AnswerEvent, ClientGone, Ended, Generation, Idle, answer
from k2cli.server.shapes import Shape
from k2cli.server.text import Piece, TextAssembler

KEEP_ALIVE_SECONDS = 15.0
_DONE = b"data: [DONE]\n\n"
# A comment in the event stream, so that proxies do not close it during a long prefill.
_KEEP_ALIVE = b": waiting\n\n"


def _event(document: dict[str, Any]) -> bytes:
    return b"data: " + msgspec.json.encode(document) + b"\n\n"


class EventWriter:
    """Encoder from the events of one answer to the bytes of its stream."""

    def __init__(self, shape: Shape, assembler: TextAssembler, request: EngineRequest) -> None:
        self._shape = shape
        self._assembler = assembler
        self._progress = request.wants_progress
        self._usage = request.wants_usage
        self._opened = False
        self._position: int | None = None
        self._last_sent = time.monotonic()

    def write(self, event: AnswerEvent) -> bytes:
        """Return the bytes for an event, which may be empty."""
        match event:
            case Idle():
                data = self._idle(event)
            case PromptProgress():
                data = self._prompt_progress(event)
            case Piece():
                data = self._text(event)
            case Ended():
                data = self._end(event)
        if data:
            self._last_sent = time.monotonic()
        return data

    def _chunk(self, choices: list[dict[str, Any]], **members: Any) -> bytes:
        if self._usage:
            members.setdefault("usage", None)
        return _event(self._shape.chunk(choices, **members))

    def _idle(self, event: Idle) -> bytes:
        if self._progress and event.queue_position != self._position:
            self._position = event.queue_position
            if event.queue_position is not None:
                return self._chunk([], k2={"queue_position": event.queue_position})
        silent_seconds = time.monotonic() - self._last_sent
        return _KEEP_ALIVE if silent_seconds >= KEEP_ALIVE_SECONDS else b""

    def _prompt_progress(self, event: PromptProgress) -> bytes:
        if not self._progress:
            return b""
        done = {
            "prefill_done": event.done,
            "prefill_total": event.total,
            "cached_tokens": event.cached,
        }
        return self._chunk([], k2=done)

    def _open(self) -> bytes:
        if self._opened:
            return b""
        self._opened = True
        opening = self._shape.opening()
        return self._chunk([opening]) if opening else b""

    def _text(self, piece: Piece) -> bytes:
        if not self._progress and not piece.text and not piece.scores:
            return b""
        counted = {"k2": {"completion_tokens": self._assembler.tokens_used}}
        members: dict[str, Any] = counted if self._progress else {}
        choices = [self._shape.delta(piece)] if piece.text or piece.scores else []
        return self._open() + self._chunk(choices, **members)

    def _end(self, event: Ended) -> bytes:
        data = self._open() + self._chunk([self._shape.closing(event.finish_reason)])
        if self._usage:
            data += self._chunk([], usage=event.usage)
        return data + _DONE


async def event_stream(
    generation: Generation, assembler: TextAssembler, writer: EventWriter
) -> AsyncGenerator[bytes]:
    """Yield the bytes of a stream, including the error that may end it."""
    try:
        async with aclosing(answer(generation, assembler)) as events:
            async for event in events:
                if data := writer.write(event):
                    yield data
    except ApiError as error:
        yield _event(error.body())
    except ClientGone:
        return
    except Exception as error:
        # The client must learn that the answer is incomplete; uvicorn logs the traceback.
        message = f"internal error: {type(error).__name__}"
        yield _event(ApiError(500, message, kind="server_error", code="internal_error").body())
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
