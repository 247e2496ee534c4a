"""The HTTP API inside the leader's guard: uvicorn in the guard's own event loop.

The port is bound before the ranks have loaded, so that a client is told the state instead of
being refused, and it outlives the ranks.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import ipaddress
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from k2cli.errors import ClusterError
from k2cli.guard.engine_bridge import EngineBridge
from k2cli.protocol import Bootstrap, HttpEndpoint

_CLOSE_SECONDS = 2
_PORTS_TRIED = 100


def api_url(host: str, port: int, node: str) -> str:
    """The address to give to a client: a wildcard host is replaced by the node's name."""
    with contextlib.suppress(ValueError):
        address = ipaddress.ip_address(host)
        if address.is_unspecified:
            host = node
        elif address.version == 6:
            host = f"[{host}]"
    return f"http://{host}:{port}"


def _listen(host: str, port: int) -> socket.socket:
    family, kind, protocol, _, address = socket.getaddrinfo(
        host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(128)
    except OSError:
        listener.close()
        raise
    return listener


def _take_port(endpoint: HttpEndpoint) -> tuple[socket.socket, int]:
    """Bind the endpoint's port, or a later one if that will do and the first is taken by now.

    Raises:
        ClusterError: if no port can be had.
    """
    last = endpoint.port + (_PORTS_TRIED if endpoint.next_port_will_do else 0)
    for port in range(endpoint.port, last + 1):
        try:
            return _listen(endpoint.host, port), port
        except OSError as error:
            if error.errno != errno.EADDRINUSE or port == last:
                raise ClusterError(
                    f"the API cannot listen on {endpoint.host}:{port}: {error.strerror or error}"
                ) from error
    raise AssertionError("the last port either binds or raises")


def _build_server(bootstrap: Bootstrap, bridge: EngineBridge) -> Any:
    """The uvicorn server with the whole application; imports and tokenizer take a second or more.

    Raises:
        K2Error: if the checkpoint's tokenizer cannot be read.
    """
    import uvicorn

    from k2cli.models.text.tokenizer import Tokenizer
    from k2cli.server.app import create_app
    from k2cli.server.served_model import load_served_model

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
        self._closing = False
        self.url = ""
        self.answering = asyncio.Event()

    def bind(self) -> None:
        """Take the port, which decides ``url``.

        Raises:
            ClusterError: if it is taken, or the address is not this machine's.
        """
        self._listener, port = _take_port(self._endpoint)
        self.url = api_url(self._endpoint.host, port, self._bootstrap.assignment.nodes[0])

    async def serve(self) -> None:
        """Serve until ``close``.

        Raises:
            K2Error: if the application cannot be made from this checkpoint.
        """
        assert self._listener is not None
        self._server = await asyncio.to_thread(_build_server, self._bootstrap, self._bridge)
        if self._closing:
            return  # while it was made; the listener is closed already
        serving = asyncio.create_task(self._server.serve(sockets=[self._listener]))
        while not self._server.started and not serving.done():
            await asyncio.sleep(0.01)
        self.answering.set()
        await serving

    async def close(self) -> None:
        """Stop taking requests and give the open ones a moment to send what they have."""
        self._closing = True
        if self._server is not None:
            self._server.should_exit = True
            await asyncio.sleep(0)
        elif self._listener is not None:
            self._listener.close()
