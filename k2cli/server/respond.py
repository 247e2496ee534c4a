"""One code path for both generating routes: from a request body to the response."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import aclosing

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from k2cli.server.context import context_of
from k2cli.server.errors import CLIENT_CLOSED_REQUEST
from k2cli.server.generation import ClientGone, Ended, Generation, answer
from k2cli.server.read_request import RequestKind
from k2cli.server.shapes import Shape
from k2cli.server.streaming import EventStreamResponse, EventWriter, event_stream
from k2cli.server.text import Piece, ScoredToken, TextAssembler


async def respond(
    request: Request,
    kind: RequestKind,
    make_shape: Callable[[str, str, Callable[[int], str], bool], Shape],
) -> Response:
    """Generate an answer, streamed or whole.

    Args:
        prepare: makes the engine's request from the body.
        make_shape: a class of ``server.shapes``.

    Raises:
        ApiError: with the HTTP status, if the request fails before the answer has begun.
    """
    context = context_of(request)
    read = await context.reader.read(kind, await request.body())
    engine_request = read.engine_request
    assert engine_request is not None
    # Checked after the body, so that a wrong request gets its error even while no run is ready.
    context.require_ready()
    scored = engine_request.generate.sampling.top_logprobs is not None
    name, request_id = context.served.name, engine_request.generate.request_id
    shape = make_shape(request_id, name, context.token_text, scored)
    assembler = TextAssembler(context.tokenizer.stream(), engine_request.stops)
    generation = Generation(context.engine, engine_request, context.waiting, request.receive)
    generation.start()
    if not engine_request.stream:
        return await _whole(generation, assembler, shape)
    try:
        await generation.wait_for_first_event()
    except ClientGone:
        await generation.close()
        return Response(status_code=CLIENT_CLOSED_REQUEST)
    except BaseException:
        await generation.close()
        raise
    writer = EventWriter(shape, assembler, engine_request)
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
