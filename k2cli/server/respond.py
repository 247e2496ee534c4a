"""One code path for all generating routes: from a request body to the response."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import aclosing
from typing import Any

from msgspec.structs import replace
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from k2cli.server.admission import MeteredEngine, admit, client_of, key_revoked, owned
from k2cli.server.context import ServerContext, context_of
from k2cli.server.dialects.writer import AnswerContext, AnswerWriter
from k2cli.server.engine_request import EngineRequest
from k2cli.server.errors import CLIENT_CLOSED_REQUEST
from k2cli.server.generation import ClientGone, Ended, Generation, Step, answer
from k2cli.server.metrics.request_record import record_of
from k2cli.server.output.events import Blocks, OutputParser
from k2cli.server.read_request import RequestKind
from k2cli.server.streaming import (
    EventStreamResponse,
    SlowAnswerResponse,
    answer_or_wait,
    event_stream,
)
from k2cli.server.text_assembler import TextAssembler


async def respond(
    request: Request,
    kind: RequestKind,
    make_writer: Callable[[AnswerContext], AnswerWriter],
) -> Response:
    """Generate an answer, streamed or whole.

    Args:
        kind: how the body is read.
        make_writer: a class of ``server.dialects``.

    Raises:
        ApiError: with the HTTP status, if the request fails before the answer has begun.
    """
    context, record = context_of(request), record_of(request.scope)
    body = await request.body()
    record.note_received()
    read = await context.reader.read(kind, body)
    engine_request = read.engine_request
    assert engine_request is not None
    # Checked after the body, so that a wrong request gets its error even while no run is ready.
    context.require_ready()
    model = engine_request.model or context.served.name
    writer = make_writer(AnswerContext(engine_request, model, context.token_text))
    output_format, options = context.served.output_format, engine_request.output
    assembler = TextAssembler(
        context.tokenizer.stream(), engine_request.stops, output_format.marker_tokens(options)
    )
    parser = output_format.parser(options)
    generation = _admitted(request, context, engine_request)
    generation.start()
    if not engine_request.stream:
        return await _whole(generation, assembler, parser, writer)
    try:
        await generation.wait_for_first_event()
    except ClientGone:
        await generation.close()
        return Response(status_code=CLIENT_CLOSED_REQUEST)
    except BaseException:
        await generation.close()
        raise
    return EventStreamResponse(generation, event_stream(generation, assembler, parser, writer))


def _admitted(
    request: Request, context: ServerContext, engine_request: EngineRequest
) -> Generation:
    """Let a request in by the limits of its key; the revocation of that key ends it.

    Raises:
        ApiError: 429 beyond a limit.
    """
    client = client_of(request.scope)
    admission = admit(request, engine_request.generate)

    def close() -> None:
        client.forget(admission)
        admission.close()

    shares = context.served.shares_prefixes
    generate = owned(engine_request.generate, client, shares_prefixes=shares)
    generation = Generation(
        MeteredEngine(context.engine, admission),
        replace(engine_request, generate=generate),
        context.waiting,
        request.receive,
        record_of(request.scope),
        close,
    )
    client.watch(admission, lambda: generation.fail(key_revoked()))
    return generation


async def _whole(
    generation: Generation, assembler: TextAssembler, parser: OutputParser, writer: AnswerWriter
) -> Response:
    async def collected() -> dict[str, Any]:
        blocks = Blocks()
        async with aclosing(answer(generation, assembler, parser)) as events:
            async for event in events:
                if isinstance(event, Step):
                    blocks.add(event.events)
                elif isinstance(event, Ended):
                    return writer.whole(blocks, event)
        raise AssertionError("an answer ends with Ended")

    waits = False
    try:
        found = await answer_or_wait(generation, collected(), writer)
        waits = isinstance(found, SlowAnswerResponse)
        return found if isinstance(found, SlowAnswerResponse) else JSONResponse(found)
    except ClientGone:
        return Response(status_code=CLIENT_CLOSED_REQUEST)
    finally:
        if not waits:
            await generation.close()
