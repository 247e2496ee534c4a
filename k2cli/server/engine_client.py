"""What the HTTP server needs of the engine: one protocol, implemented by the guard's bridge.

The server never talks to a rank. It submits a validated ``Generate`` and reads the messages that
come back for it; the bridge in the leader's guard carries both over the socket to the rank, and
raises ``EngineUnavailable`` in every open iterator when the run ends underneath.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Literal, Protocol

from k2cli.protocol import Finished, Generate, PromptProgress, RequestFailed, Tokens

EngineState = Literal["starting", "ready", "stopping", "failed"]
EngineEvent = PromptProgress | Tokens | Finished | RequestFailed


class EngineUnavailable(Exception):
    """There is no run that could serve this request, or it ended while it did.

    Args:
        cause: one sentence for the client, without a full stop.
    """

    def __init__(self, cause: str) -> None:
        super().__init__(cause)
        self.cause = cause


class EngineClient(Protocol):
    """The engine as the HTTP server sees it. Used from one asyncio event loop only."""

    @property
    def state(self) -> EngineState:
        """Whether requests can be served now; only ``ready`` means yes."""
        ...

    @property
    def cause(self) -> str:
        """Why the state is not ``ready``: one sentence, without a full stop. Else empty."""
        ...

    def submit(self, request: Generate) -> AsyncIterator[EngineEvent]:
        """Send the request when first iterated; yield its events up to ``Finished`` or
        ``RequestFailed``, which is the last one.

        A cancelled request ends with ``Finished`` of reason ``cancelled``; whoever stops
        iterating early must call ``cancel`` as well.

        Raises:
            EngineUnavailable: from the iterator, if no run is ready, or it ends underneath.
        """
        ...

    def cancel(self, request_id: str) -> None:
        """Tell the engine that nobody wants the rest. Idempotent; unknown ids are ignored."""
        ...
