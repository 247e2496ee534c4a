"""The interface of the engine for the HTTP server, implemented by the guard's bridge.

The server never talks to a rank. It submits a validated ``Generate`` and reads the messages that
come back for it. The bridge in the leader's guard carries both over the socket to the rank, and
raises ``EngineUnavailable`` in every open iterator when the run ends. ``RequestQueue`` has the
order in which the engine would start what waits.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from k2cli.protocol import Finished, Generate, Paused, PromptProgress, RequestFailed, Tokens

EngineState = Literal["starting", "ready", "stopping", "failed"]
EngineEvent = PromptProgress | Paused | Tokens | Finished | RequestFailed


class EngineUnavailable(Exception):
    """Error for a request that no run can serve, or whose run has ended.

    Args:
        cause: one sentence for the client, without a full stop.
    """

    def __init__(self, cause: str) -> None:
        super().__init__(cause)
        self.cause = cause


@dataclass(slots=True)
class RequestQueue:
    """The requests that the engine has not started, in the order in which it would start them.

    The engine tells its order about twice a second. Requests of which it has told nothing yet, and
    those that it has not got because of a limit of their key, come after the others as they came.
    A request that comes later may be first: positions can rise.
    """

    _requests: dict[str, None] = field(default_factory=dict)
    _order: dict[str, int] = field(default_factory=dict)

    def join(self, request_id: str) -> None:
        """Add a request at the end."""
        self._requests[request_id] = None

    def leave(self, request_id: str) -> None:
        """Remove a request that the engine has started or that has ended."""
        self._requests.pop(request_id, None)

    def note_order(self, request_ids: Sequence[str]) -> None:
        """Record the order in which the engine would start requests."""
        self._order = {request_id: index for index, request_id in enumerate(request_ids)}

    def position(self, request_id: str) -> int | None:
        """Return 1 for the next request, None for a request that is not waiting."""
        return self.positions().get(request_id) if request_id in self._requests else None

    def positions(self) -> dict[str, int]:
        """Return the positions of all requests that wait, by their ids."""
        last = len(self._order)
        ordered = sorted(self._requests, key=lambda request_id: self._order.get(request_id, last))
        return {request_id: index for index, request_id in enumerate(ordered, start=1)}


class EngineClient(Protocol):
    """The engine, for the HTTP server. Use it from one asyncio event loop only."""

    @property
    def state(self) -> EngineState:
        """State of the run; requests are served only in ``ready``."""
        ...

    @property
    def cause(self) -> str:
        """Reason for a state other than ``ready``: one sentence without a full stop, or empty."""
        ...

    def submit(self, request: Generate) -> AsyncIterator[EngineEvent]:
        """Send the request when first iterated, and yield its events.

        The last event is ``Finished`` or ``RequestFailed``. A cancelled request ends with
        ``Finished`` of reason ``cancelled``. A caller that stops iterating early must also call
        ``cancel``.

        Raises:
            EngineUnavailable: from the iterator, if no run is ready, or the run ends.
        """
        ...

    def cancel(self, request_id: str) -> None:
        """Cancel a request. Idempotent; unknown ids are ignored."""
        ...
