"""The API of a run as the leader's guard keeps it, from the first attempt to the last."""

from __future__ import annotations

import asyncio
import contextlib

from k2cli.guard.api_server import ApiServer
from k2cli.guard.engine_bridge import EngineBridge
from k2cli.protocol import Bootstrap

_CLOSE_SECONDS = 3.0


class ApiFront:
    """The bridge to whichever rank leads now, and the server in front of it, if the run has one."""

    def __init__(self, bootstrap: Bootstrap, bridge: EngineBridge) -> None:
        self.bridge = bridge
        self._api: ApiServer | None = None
        if bootstrap.http is not None:
            self._api = ApiServer(bootstrap, bootstrap.http, bridge)
        self._serving: asyncio.Task[None] | None = None

    @property
    def url(self) -> str:
        """Where it answers; empty for a run without an API."""
        return self._api.url if self._api is not None else ""

    def open(self) -> None:
        """Take the port and begin to serve; does nothing if that was done.

        Raises:
            ClusterError: if the port is taken, or the address is not this machine's.
        """
        if self._api is not None and self._serving is None:
            self._api.bind()
            self._serving = asyncio.create_task(self._api.serve())

    async def follow(self) -> None:
        """Wait for the end of serving.

        Raises:
            K2Error: if the application cannot be made from this checkpoint.
        """
        if self._serving is not None:
            await asyncio.shield(self._serving)

    async def answering(self) -> None:
        """Wait until it answers."""
        if self._api is not None:
            await self._api.answering.wait()

    async def close(self) -> None:
        """Stop serving, and give open requests a moment to send what they have."""
        if self._api is None or self._serving is None:
            return
        await self._api.close()
        if self._api.answering.is_set():
            await asyncio.wait([self._serving], timeout=_CLOSE_SECONDS)
        self._serving.cancel()
        with contextlib.suppress(asyncio.CancelledError, Exception):
            await self._serving
