"""The HTTP API inside the leader's guard: uvicorn in the guard's own event loop.

The port is bound before the ranks have loaded, so that a client is told the state instead of
being refused, and it outlives the ranks.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from k2cli.errors import ClusterError
from k2cli.runtime.guard_bridge import EngineBridge
from k2cli.runtime.protocol import Bootstrap, HttpEndpoint

_CLOSE_SECONDS = 2


def api_url(endpoint: HttpEndpoint, node: str) -> str:
    """The address to give to a client: a wildcard host is replaced by the node's name."""
    host = endpoint.host
    with contextlib.suppress(ValueError):
        address = ipaddress.ip_address(host)
        if address.is_unspecified:
            host = node
        elif address.version == 6:
            host = f"[{host}]"
    return f"http://{host}:{endpoint.port}"


def _listen(endpoint: HttpEndpoint) -> socket.socket:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            endpoint.host, endpoint.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen(128)
        except OSError:
            listener.close()
            raise
    except OSError as error:
        raise ClusterError(
            f"the API cannot listen on {endpoint.host}:{endpoint.port}: {error.strerror or error}"
        ) from error
    return listener


def _build_server(bootstrap: Bootstrap, bridge: EngineBridge) -> Any:
    """The uvicorn server with the whole application; imports and tokenizer take a second or more.

    Raises:
        K2Error: if the checkpoint's tokenizer cannot be read.
    """
    import uvicorn

    from k2cli.models.tokenizer import Tokenizer
    from k2cli.server.app import create_app
    from k2cli.server.served import load_served_model

    class GuardedServer(uvicorn.Server):
        """A uvicorn server that leaves the guard's signal handlers alone."""

        @contextlib.contextmanager
        def capture_signals(self) -> Iterator[None]:
            yield

    assignment = bootstrap.assignment
    folder = Path(assignment.model_path)
    api_key = bootstrap.http.api_key if bootstrap.http else None
    served = load_served_model(
        folder, bootstrap.model_name, assignment.context_length, api_key=api_key
    )
    app = create_app(bridge, Tokenizer.load(folder), served)
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=_CLOSE_SECONDS,
    )
    return GuardedServer(config)


class ApiServer:
    """The API of one run. ``bind`` first, then ``serve`` for as long as it lasts."""

    def __init__(self, bootstrap: Bootstrap, endpoint: HttpEndpoint, bridge: EngineBridge) -> None:
        self._bootstrap = bootstrap
        self._bridge = bridge
        self._endpoint = endpoint
        self._listener: socket.socket | None = None
        self._server: Any = None
        self.url = api_url(endpoint, bootstrap.assignment.nodes[0])
        self.answering = asyncio.Event()

    def bind(self) -> None:
        """Take the port.

        Raises:
            ClusterError: if it is taken, or the address is not this machine's.
        """
        self._listener = _listen(self._endpoint)

    async def serve(self) -> None:
        """Serve until ``close``.

        Raises:
            K2Error: if the application cannot be made from this checkpoint.
        """
        assert self._listener is not None
        self._server = await asyncio.to_thread(_build_server, self._bootstrap, self._bridge)
        serving = asyncio.create_task(self._server.serve(sockets=[self._listener]))
        while not self._server.started and not serving.done():
            await asyncio.sleep(0.01)
        self.answering.set()
        await serving

    async def close(self) -> None:
        """Stop taking requests and give the open ones a moment to send what they have."""
        if self._server is not None and self.answering.is_set():
            self._server.should_exit = True
            await asyncio.sleep(0)
        elif self._listener is not None:
            self._listener.close()
