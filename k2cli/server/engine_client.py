"""The interface of the engine for the HTTP server, implemented by the guard's bridge.

The server never talks to a rank. It submits a validated ``Generate`` and reads the messages that
come back for it. The bridge in the leader's guard carries both over the socket to the rank, and
raises ``EngineUnavailable`` in every open iterator when the run ends.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Literal, Protocol

from k2cli.protocol import Finished, Generate, PromptProgress, RequestFailed, Tokens

EngineState = Literal["starting", "ready", "stopping", "failed"]
EngineEvent = PromptProgress | Tokens | Finished | RequestFailed


class EngineUnavailable(Exception):
    """Error for a request that no run can serve, or whose run has ended.

    Args:
        cause: one sentence for the client, without a full stop.
    """

    def __init__(self, cause: str) -> None:
        super().__init__(cause)
        self.cause = cause


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
