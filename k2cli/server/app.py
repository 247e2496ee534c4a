"""The HTTP application: OpenAI's routes over one engine.

It runs in the leader's guard, so the port outlives the ranks: while no run is ready, inference
answers 503 with the cause. There is no CORS header: a web page elsewhere has no business here.
"""

from __future__ import annotations

from fastapi import FastAPI

from k2cli import __version__
from k2cli.server.auth import Gatekeeper
from k2cli.server.context import ServerContext
from k2cli.server.engine_client import EngineClient
from k2cli.server.errors import install_error_handlers
from k2cli.server.prepare import ServerTokenizer
from k2cli.server.routes import chat, completions, health, models, tokenize
from k2cli.server.served import ServedModel


def create_app(engine: EngineClient, tokenizer: ServerTokenizer, served: ServedModel) -> FastAPI:
    """Build the application.

    Args:
        engine: where requests go; its ``state`` is asked anew for each of them.
        tokenizer: of the served model (``models.tokenizer.Tokenizer``).
        served: name, limits, defaults and API key.
    """
    app = FastAPI(
        title="k2", version=__version__, openapi_url=None, docs_url=None, redirect_slashes=False
    )
    app.state.context = ServerContext(engine, tokenizer, served)
    for module in (chat, completions, models, tokenize, health):
        app.include_router(module.router)
    install_error_handlers(app)
    app.add_middleware(Gatekeeper, served=served)
    return app
