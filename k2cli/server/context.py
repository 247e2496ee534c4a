"""The objects that all routes share: engine, tokenizer, served model, waiting requests."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypeVar

from pydantic import BaseModel, ValidationError
from starlette.requests import Request

from k2cli.server.engine_client import EngineClient
from k2cli.server.engine_request import ServerTokenizer
from k2cli.server.errors import unavailable, validation_failure
from k2cli.server.generation import RequestQueue
from k2cli.server.schemas import GenerationBody
from k2cli.server.served_model import ServedModel

Body = TypeVar("Body", bound=BaseModel)
GenerationBodyT = TypeVar("GenerationBodyT", bound=GenerationBody)


@dataclass(frozen=True, slots=True)
class ServerContext:
    """The shared objects of one application, stored at ``app.state.context``."""

    engine: EngineClient
    tokenizer: ServerTokenizer
    served: ServedModel
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


async def read_body(request: Request, model: type[Body]) -> Body:
    """Parse the request body; ignore its content type.

    Raises:
        ApiError: 400 with the name of the wrong field.
    """
    try:
        return model.model_validate_json(await request.body())
    except ValidationError as error:
        raise validation_failure(error) from error
