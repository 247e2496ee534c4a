"""The admission of requests by the limits of the key that they were sent with.

``auth`` finds the client of a request. Before the engine gets the request, its client's limits are
checked here. While it runs, what the engine computes is counted, and if the key is revoked, the
request is ended.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator

from msgspec.structs import replace
from starlette.requests import Request
from starlette.types import Scope

from k2cli.access.key_ring import Client
from k2cli.access.limits import Admission, LimitReached
from k2cli.protocol import Finished, Generate, PromptProgress, Tokens
from k2cli.server.engine_client import EngineClient, EngineEvent, EngineState
from k2cli.server.errors import ApiError

_CLIENT = "k2.client"


def set_client(scope: Scope, client: Client) -> None:
    """Record the client of a request."""
    scope[_CLIENT] = client


def client_of(scope: Scope) -> Client:
    """Return the client of a request; one without limits if none was recorded."""
    client: Client = scope.setdefault(_CLIENT, Client())
    return client


def key_revoked() -> ApiError:
    """Make the error for a request whose key was revoked while it was read or answered."""
    return ApiError(401, "this API key was revoked", code="invalid_api_key")


def admit(request: Request, generate: Generate) -> Admission:
    """Let a request in by the limits of its client.

    Raises:
        ApiError: 429 with numbers and ``Retry-After``, or 401 if its key was revoked meanwhile.
    """
    client = client_of(request.scope)
    if client.is_revoked:
        raise key_revoked()
    try:
        prompt = generate.prompt
        return client.usage.admit(len(prompt), prompt, generate.max_tokens)
    except LimitReached as error:
        raise ApiError(
            429,
            f"{error.message}; try again in {error.retry_seconds} s",
            kind="rate_limit_error",
            code="rate_limit_exceeded",
            headers={"Retry-After": str(error.retry_seconds)},
        ) from error


def owned(generate: Generate, client: Client, *, shares_prefixes: bool) -> Generate:
    """Return the engine's request with its owner, and the caches that it may use."""
    scope = "" if shares_prefixes else client.owner
    return replace(generate, owner=client.owner, prefix_scope=scope)


class MeteredEngine:
    """The engine for one admitted request: it gets it when it is its turn, and is counted."""

    def __init__(self, engine: EngineClient, admission: Admission) -> None:
        self._engine = engine
        self._admission = admission
        self._waits = True

    @property
    def state(self) -> EngineState:
        return self._engine.state

    @property
    def cause(self) -> str:
        return self._engine.cause

    def cancel(self, request_id: str) -> None:
        """Cancel the request; one that waits for its turn never reaches the engine."""
        if self._waits:
            self._admission.close()
        else:
            self._engine.cancel(request_id)

    async def submit(self, request: Generate) -> AsyncIterator[EngineEvent]:
        """Wait for the turn of the request, then yield the engine's events.

        Raises:
            EngineUnavailable: like the engine.
        """
        waited = 0.0
        try:
            if self._admission.waits:
                began = time.monotonic()
                await self._admission.wait_for_turn()
                waited = time.monotonic() - began
            self._waits = False
            if self._admission.is_closed:
                prompt = len(request.prompt)
                yield Finished(request.request_id, "cancelled", prompt, 0, 0, waited, 0.0, 0.0)
                return
            async for event in self._engine.submit(request):
                yield self._counted(event, waited)
        finally:
            self._admission.close()

    def _counted(self, event: EngineEvent, waited_seconds: float) -> EngineEvent:
        match event:
            case PromptProgress(done=done, cached=cached):
                self._admission.prompt_computed(done, cached)
            case Tokens(tokens=tokens):
                self._admission.generated(len(tokens))
            case Finished(reason="cancelled"):
                pass  # it names the whole prompt, of which a part may not have been computed
            case Finished():
                computed = event.prompt_tokens - event.cached_tokens + event.completion_tokens
                self._admission.finished(computed)
                return replace(event, queue_seconds=event.queue_seconds + waited_seconds)
            case _:
                pass
        return event
