"""What the routes share: the engine, the tokenizer, the served model and the waiting line."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import TypeVar

from pydantic import BaseModel, ValidationError
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from k2cli.server.engine_client import EngineClient
from k2cli.server.engine_request import Prepared, ServerTokenizer
from k2cli.server.errors import CLIENT_CLOSED_REQUEST, unavailable, validation_failure
from k2cli.server.generation import ClientGone, Ended, Generation, WaitingLine, answer
from k2cli.server.schemas import GenerationBody
from k2cli.server.served_model import ServedModel
from k2cli.server.shapes import Shape
from k2cli.server.streaming import EventStreamResponse, EventWriter, event_stream
from k2cli.server.text import Piece, ScoredToken, TextAssembler

Body = TypeVar("Body", bound=BaseModel)
GenerationBodyT = TypeVar("GenerationBodyT", bound=GenerationBody)


@dataclass(frozen=True, slots=True)
class ServerContext:
    """One per application, at ``app.state.context``."""

    engine: EngineClient
    tokenizer: ServerTokenizer
    served: ServedModel
    line: WaitingLine = field(default_factory=WaitingLine)

    def require_ready(self) -> None:
        """Raise a 503 with the cause, unless the engine takes requests.

        Raises:
            ApiError: 503.
        """
        if self.engine.state != "ready":
            raise unavailable(self.engine.cause or f"the run is {self.engine.state}")

    def token_text(self, token: int) -> str:
        """Text of one token by itself, special ones too, for logprobs."""
        return self.tokenizer.decode([token], skip_special_tokens=False)


def context_of(request: Request) -> ServerContext:
    """The context of the application that handles this request."""
    context: ServerContext = request.app.state.context
    return context


async def read_body(request: Request, model: type[Body]) -> Body:
    """Parse the request body, whatever its content type says.

    Raises:
        ApiError: 400 that names the field.
    """
    try:
        return model.model_validate_json(await request.body())
    except ValidationError as error:
        raise validation_failure(error) from error


async def respond(
    request: Request,
    body: GenerationBodyT,
    prepare: Callable[[GenerationBodyT, ServerTokenizer, ServedModel], Prepared],
    make_shape: Callable[[str, str, Callable[[int], str], bool], Shape],
) -> Response:
    """Generate an answer, streamed or whole.

    Args:
        make_shape: a class of ``server.shapes``.

    Raises:
        ApiError: with the HTTP status, if the request fails before an answer has begun.
    """
    context = context_of(request)
    prepared = await asyncio.to_thread(prepare, body, context.tokenizer, context.served)
    # Only now: a request that is wrong is told so even while no run is ready.
    context.require_ready()
    scored = prepared.generate.sampling.top_logprobs is not None
    name, request_id = context.served.name, prepared.generate.request_id
    shape = make_shape(request_id, name, context.token_text, scored)
    assembler = TextAssembler(context.tokenizer.stream(), prepared.stops)
    generation = Generation(context.engine, prepared, context.line, request.receive)
    generation.start()
    if not body.stream:
        return await _whole(generation, assembler, shape)
    try:
        await generation.settle()
    except ClientGone:
        await generation.close()
        return Response(status_code=CLIENT_CLOSED_REQUEST)
    except BaseException:
        await generation.close()
        raise
    writer = EventWriter(shape, assembler, body)
    return EventStreamResponse(generation, event_stream(generation, assembler, writer))


async def _whole(generation: Generation, assembler: TextAssembler, shape: Shape) -> Response:
    text: list[str] = []
    scores: list[ScoredToken] = []
    try:
        async with aclosing(answer(generation, assembler)) as events:
            async for event in events:
                if isinstance(event, Piece):
                    text.append(event.text)
                    scores.extend(event.scores)
                elif isinstance(event, Ended):
                    whole = shape.whole("".join(text), scores, event.finish_reason, event.usage)
                    return JSONResponse(whole)
        raise AssertionError("an answer ends with Ended")
    except ClientGone:
        return Response(status_code=CLIENT_CLOSED_REQUEST)
    finally:
        await generation.close()
