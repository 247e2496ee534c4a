"""The objects that all routes share: engine, tokenizer, served model, waiting requests."""

from __future__ import annotations

from dataclasses import dataclass, field

from starlette.requests import Request

from k2cli.server.engine_client import EngineClient, RequestQueue
from k2cli.server.engine_request import ServerTokenizer
from k2cli.server.errors import unavailable
from k2cli.server.metrics.activity import Activity
from k2cli.server.metrics.run_view import RunSource
from k2cli.server.reader_queues import RequestReader
from k2cli.server.served_model import ServedModel


@dataclass(frozen=True, slots=True)
class ServerContext:
    """The shared objects of one application, stored at ``app.state.context``."""

    engine: EngineClient
    tokenizer: ServerTokenizer
    served: ServedModel
    reader: RequestReader
    activity: Activity
    run: RunSource
    waiting: RequestQueue = field(default_factory=RequestQueue)

    def require_ready(self) -> None:
        """Check that the engine takes requests.

        Raises:
            ApiError: 503 with the cause, if it does not.
        """
        if self.engine.state != "ready":
            raise unavailable(self.engine.cause or f"the run is {self.engine.state}")

    def token_text(self, token: int) -> str:
        """Return the text of one token alone, special tokens included, for logprobs."""
        return self.tokenizer.decode([token], skip_special_tokens=False)


def context_of(request: Request) -> ServerContext:
    """Return the context of the application that handles this request."""
    context: ServerContext = request.app.state.context
    return context
