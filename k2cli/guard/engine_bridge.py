"""The bridge between HTTP and the leader rank: sends requests and distributes their events.

It implements ``server.engine_client.EngineClient`` in the event loop of the leader's guard. The id
of a request tells to which open request an event belongs.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

from k2cli.protocol import (
    Cancel,
    Finished,
    Generate,
    RequestFailed,
)
from k2cli.server.engine_client import (
    EngineEvent,
    EngineState,
    EngineUnavailable,
    RequestQueue,
)


class EngineBridge:
    """The engine of one run, for the HTTP server.

    Args:
        send: sends a message to the leader rank.
    """

    def __init__(self, send: Callable[[Generate | Cancel], None]) -> None:
        self._send = send
        self._state: EngineState = "starting"
        self._cause = "the model is still loading"
        # None in a queue means that the engine has ended.
        self._open: dict[str, asyncio.Queue[EngineEvent | None]] = {}
        self.waiting = RequestQueue()
        """The requests that the engine has not started, in its order."""

    @property
    def state(self) -> EngineState:
        return self._state

    @property
    def cause(self) -> str:
        return self._cause

    async def submit(self, request: Generate) -> AsyncIterator[EngineEvent]:
        """Send the request and yield its events, the last one included.

        Raises:
            EngineUnavailable: if no engine is ready, or it ends before the request does.
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
            again = self.state == "starting"  # then the cause is a sentence already
            raise EngineUnavailable(self._cause if again else f"the run has ended: {self._cause}")
        finally:
            self._open.pop(request.request_id, None)

    def cancel(self, request_id: str) -> None:
        """Cancel a request. The rank ignores unknown ids."""
        if self._state == "ready":
            self._send(Cancel(request_id))

    # --- called by the guard --------------------------------------------------------------------

    def ready(self) -> None:
        """Take requests from now on: every rank has passed its checks."""
        if self._state == "starting":
            self._state, self._cause = "ready", ""

    def deliver(self, event: EngineEvent) -> None:
        """Put an event into the queue of its request. Drop it if the client has left."""
        if (queue := self._open.get(event.request_id)) is not None:
            queue.put_nowait(event)

    def begin_again(self, cause: str) -> None:
        """Refuse requests while a new attempt loads after a failure."""
        self._state = "starting"
        self._cause = f"the model is being loaded again: {cause}"

    def end(self, cause: str, *, failed: bool) -> None:
        """End every open request with ``cause``: the engine is ending or has ended."""
        self._state = "failed" if failed else "stopping"
        self._cause = cause
        for queue in self._open.values():
            queue.put_nowait(None)
