"""The HTTP application: the routes of OpenAI and Anthropic over one engine.

It runs in the leader's guard, so the port outlives the ranks: while no run is ready, inference
answers 503 with the cause. A web page elsewhere may use it only if its origin was allowed.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.routing import Route

from k2cli.access.key_ring import KeyRing
from k2cli.server.auth import AccessControl
from k2cli.server.context import ServerContext
from k2cli.server.dialects.error_responses import RequestIds, install_error_handlers
from k2cli.server.engine_client import EngineClient, RequestQueue
from k2cli.server.engine_request import ServerTokenizer
from k2cli.server.metrics.activity import Activity, RecordRequests
from k2cli.server.metrics.run_view import RunSource, UnwatchedRun
from k2cli.server.origins import OriginCheck, OriginRules
from k2cli.server.page.files import PAGE_FOLDER
from k2cli.server.reader_queues import RequestReader
from k2cli.server.routes import (
    chat,
    completions,
    embeddings,
    health,
    messages,
    models,
    monitoring,
    openapi,
    page,
    responses,
    tokenize,
)
from k2cli.server.served_model import ServedModel

_ROUTES = (
    Route("/v1/chat/completions", chat.create_chat_completion, methods=["POST"]),
    Route("/v1/completions", completions.create_completion, methods=["POST"]),
    Route("/v1/models", models.list_models),
    Route("/v1/models/{name:path}", models.get_model),
    Route("/v1/embeddings", embeddings.refuse_embeddings, methods=["POST"]),
    Route("/v1/tokenize", tokenize.tokenize, methods=["POST"]),
    Route("/v1/responses", responses.create_response, methods=["POST"]),
    Route("/v1/messages", messages.create_message, methods=["POST"]),
    Route("/v1/messages/count_tokens", messages.count_tokens, methods=["POST"]),
    Route("/v1/status", monitoring.status),
    Route("/metrics", monitoring.metrics),
    Route("/", page.root),
    Route(f"{PAGE_FOLDER}{{name}}", page.page_file),
    Route("/health", health.health),
    Route("/openapi.json", openapi.openapi),
)


def create_app(
    engine: EngineClient,
    tokenizer: ServerTokenizer,
    served: ServedModel,
    reader: RequestReader,
    activity: Activity | None = None,
    run: RunSource | None = None,
    keys: KeyRing | None = None,
    waiting: RequestQueue | None = None,
) -> Starlette:
    """Build the application.

    Args:
        engine: receives requests; its ``state`` is read for each request.
        tokenizer: of the served model (``models.text.tokenizer.Tokenizer``).
        served: name, limits, defaults and API key.
        reader: turns request bodies into requests for the engine.
        activity: records the requests; None for one of its own, which logs nothing.
        run: describes the run and its ranks; None if only the engine's state is known.
        keys: those that requests may be sent with; None for the API key of ``served`` alone.
        waiting: the requests that the engine has not started; None for a queue of its own.
    """
    activity = activity if activity is not None else Activity()
    ring = keys if keys is not None else KeyRing(served.api_key)
    middleware = [Middleware(AccessControl, served=served, keys=ring)]
    if served.api_key is None:
        rules = OriginRules(served.allowed_hosts, served.cors_origins)
        middleware.insert(0, Middleware(OriginCheck, rules=rules))
    middleware.insert(0, Middleware(RecordRequests, activity=activity))
    middleware.insert(0, Middleware(RequestIds))
    if served.cors_origins:
        cors = Middleware(
            CORSMiddleware,
            allow_origins=sorted(served.cors_origins),
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["x-request-id"],
        )
        middleware.insert(0, cors)

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        await reader.start()
        try:
            yield
        finally:
            await reader.close()

    app = Starlette(routes=_ROUTES, middleware=middleware, lifespan=lifespan)
    app.router.redirect_slashes = False
    source = run if run is not None else UnwatchedRun(engine)
    queue = waiting if waiting is not None else RequestQueue()
    app.state.context = ServerContext(engine, tokenizer, served, reader, activity, source, queue)
    install_error_handlers(app)
    return app
