"""The bridge between HTTP and the leader rank: requests go down, their events come back up.

It implements ``server.engine_client.EngineClient``. All of it runs in the event loop of the
leader's guard; events are handed to the request that they belong to by its id.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

from k2cli.protocol import (
    Cancel,
    Finished,
    Generate,
    PromptProgress,
    RequestFailed,
    Tokens,
)
from k2cli.server.engine_client import EngineEvent, EngineState, EngineUnavailable


class EngineBridge:
    """One engine, as the HTTP server sees it.

    Args:
        send: gives a message to the leader rank.
    """

    def __init__(self, send: Callable[[Generate | Cancel], None]) -> None:
        self._send = send
        self._state: EngineState = "starting"
        self._cause = "the model is still loading"
        # None in a queue means that the engine is gone.
        self._open: dict[str, asyncio.Queue[EngineEvent | None]] = {}

    @property
    def state(self) -> EngineState:
        """Only ``ready`` means that requests can be served."""
        return self._state

    @property
    def cause(self) -> str:
        """Why the state is not ``ready``; empty if it is."""
        return self._cause

    async def submit(self, request: Generate) -> AsyncIterator[EngineEvent]:
        """Send the request and yield its events up to and with the last one.

        Raises:
            EngineUnavailable: if no engine is ready, or it ends underneath.
        """
        if self._state != "ready":
            raise EngineUnavailable(self._cause)
        events: asyncio.Queue[EngineEvent | None] = asyncio.Queue()
        self._open[request.request_id] = events
        self._send(request)
        try:
            while (event := await events.get()) is not None:
                yield event
                if isinstance(event, Finished | RequestFailed):
                    return
            raise EngineUnavailable(self._cause)
        finally:
            self._open.pop(request.request_id, None)

    def cancel(self, request_id: str) -> None:
        """Tell the rank that nobody wants the rest of a request; unknown ids are its to ignore."""
        if self._state == "ready":
            self._send(Cancel(request_id))

    # --- the guard's side -----------------------------------------------------------------------

    def ready(self) -> None:
        """Every rank has proven its part."""
        if self._state == "starting":
            self._state, self._cause = "ready", ""

    def deliver(self, event: PromptProgress | Tokens | Finished | RequestFailed) -> None:
        """Give an event to whoever waits for it; nobody does after a client has left."""
        if (queue := self._open.get(event.request_id)) is not None:
            queue.put_nowait(event)

    def begin_again(self, cause: str) -> None:
        """A new attempt has started after a failure."""
        self._state = "starting"
        self._cause = f"the model is being loaded again: {cause}"

    def end(self, cause: str, *, failed: bool) -> None:
        """The engine is gone, or about to go: every open request ends with ``cause``."""
        self._state = "failed" if failed else "stopping"
        self._cause = cause
        for queue in self._open.values():
            queue.put_nowait(None)
