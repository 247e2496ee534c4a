"""The HTTP API inside the leader's guard: uvicorn in the guard's own event loop.

The port is bound before the ranks have loaded, so that a client gets the state of the run instead
of a refused connection. The port stays open until the run's last attempt has ended.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import ipaddress
import socket
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from k2cli.access.key_ring import KeyRing
from k2cli.access.tls_files import ServerTls, expiry_date
from k2cli.errors import ClusterError, K2Error
from k2cli.guard.engine_bridge import EngineBridge
from k2cli.protocol import Bootstrap, HttpEndpoint, LogLine, TlsCertificate
from k2cli.server.metrics.run_watch import RunWatch
from k2cli.settings import RUN_OPTION
from k2cli.system.file_limit import raise_file_limit

if TYPE_CHECKING:
    from k2cli.server.killable_reader import KillableReader
    from k2cli.server.reader_queues import ProcessReader
    from k2cli.server.served_model import ServedModel

_GRACEFUL_SECONDS = 2
_CLOSE_SECONDS = 3.0
_PORTS_TRIED = 100
RENEWAL_SECONDS = 5.0
"""Between two looks at the files of the TLS certificate."""

_WAITING_CONNECTIONS = 1024
"""Connections that the kernel holds until they are accepted; they use no files of the guard."""


def api_url(host: str, port: int, node: str, scheme: str = "http") -> str:
    """Return the URL to give to a client; the node's name replaces a wildcard host."""
    with contextlib.suppress(ValueError):
        address = ipaddress.ip_address(host)
        if address.is_unspecified:
            host = node
        elif address.version == 6:
            host = f"[{host}]"
    return f"{scheme}://{host}:{port}"


def _listen(host: str, port: int) -> socket.socket:
    family, kind, protocol, _, address = socket.getaddrinfo(
        host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(_WAITING_CONNECTIONS)
    except OSError:
        listener.close()
        raise
    return listener


def _take_port(endpoint: HttpEndpoint) -> tuple[socket.socket, int]:
    """Bind the endpoint's port, or if it is taken and the endpoint allows it, a later one.

    Raises:
        ClusterError: if no port can be bound.
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


def _load_tls(endpoint: HttpEndpoint) -> ServerTls | None:
    """Load the certificate of an endpoint; None if it has none.

    Raises:
        ClusterError: if it cannot be used.
    """
    if endpoint.tls_certificate is None or endpoint.tls_key is None:
        return None
    try:
        return ServerTls(endpoint.tls_certificate, endpoint.tls_key)
    except K2Error as error:
        raise ClusterError(error.message, error.hint) from error


def _served_model(bootstrap: Bootstrap) -> ServedModel:
    """Describe the model of a run that has an API.

    Raises:
        K2Error: if the model's ``generation_config.json`` cannot be used.
    """
    from k2cli.models.json_files import read_generation_config
    from k2cli.server.served_model import served_model_from

    assignment, endpoint = bootstrap.assignment, bootstrap.http
    assert endpoint is not None
    return replace(
        served_model_from(
            read_generation_config(Path(assignment.model_path)),
            bootstrap.model_name,
            assignment.context_length,
        ),
        api_key=endpoint.api_key,
        allowed_hosts=frozenset(name.lower() for name in (endpoint.host, *endpoint.allowed_hosts)),
        cors_origins=frozenset(endpoint.cors_origins),
        aliases=tuple(endpoint.aliases),
        normalizes_prompts=endpoint.normalizes_prompts,
        shares_prefixes=endpoint.shares_prefixes,
    )


def _first_reader(bootstrap: Bootstrap) -> KillableReader:
    """Return the process that tries the model's files, and then reads short requests."""
    from k2cli.server.killable_reader import KillableReader
    from k2cli.server.reader_messages import ReaderSettings

    served, endpoint = _served_model(bootstrap), bootstrap.http
    assert endpoint is not None
    settings = ReaderSettings(
        bootstrap.assignment.model_path,
        served.name,
        served.context_length,
        served.default_temperature,
        served.default_top_p,
        served.default_top_k,
        served.aliases,
        endpoint.tool_parser,
        endpoint.reasoning_parser,
        normalizes_prompts=served.normalizes_prompts,
    )
    return KillableReader(settings, (RUN_OPTION, bootstrap.assignment.run_id))


def _import_server() -> None:
    """Import what ``_build_server`` needs, which takes half a second."""
    import k2cli.guard.http_connection
    import k2cli.guard.output_format
    import k2cli.models.text.tokenizer
    import k2cli.server.app  # noqa: F401


def _build_server(
    bootstrap: Bootstrap,
    bridge: EngineBridge,
    first: KillableReader,
    keys: KeyRing,
    tls: ServerTls | None,
    watch: RunWatch,
    log_access: Callable[[str], None],
) -> tuple[Any, ProcessReader]:
    """Make the uvicorn server and its application.

    Raises:
        K2Error: if the checkpoint's tokenizer cannot be read.
    """
    import uvicorn

    from k2cli.guard.http_connection import (
        BACKLOG,
        ConnectionLimits,
        LimitedConnection,
        TlsConnection,
    )
    from k2cli.guard.output_format import output_format_of
    from k2cli.models.text.tokenizer import Tokenizer
    from k2cli.server.app import create_app
    from k2cli.server.metrics.activity import Activity
    from k2cli.server.reader_queues import ProcessReader

    class GuardedServer(uvicorn.Server):
        """A uvicorn server that does not replace the guard's signal handlers."""

        @contextlib.contextmanager
        def capture_signals(self) -> Iterator[None]:
            yield

    tokenizer = Tokenizer.load(Path(bootstrap.assignment.model_path))
    reader = ProcessReader(first, first.another())
    endpoint = bootstrap.http
    assert endpoint is not None
    chosen = output_format_of(tokenizer, endpoint.tool_parser, endpoint.reasoning_parser)
    served = replace(_served_model(bootstrap), output_format=chosen)
    activity = Activity(log_access)
    app = create_app(bridge, tokenizer, served, reader, activity, watch, keys, bridge.waiting)
    limits = ConnectionLimits.for_files(raise_file_limit())

    def connection(**named: Any) -> asyncio.Protocol:
        make_http = partial(LimitedConnection, limits, **named)
        return TlsConnection(lambda: tls.context, limits, make_http) if tls else make_http()

    config = uvicorn.Config(
        app,
        backlog=BACKLOG,
        http=cast("type[asyncio.Protocol]", connection),
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=_GRACEFUL_SECONDS,
    )
    return GuardedServer(config), reader


class ApiServer:
    """The API of one run, from its first attempt to its last. A run without an API has no URL.

    Args:
        bootstrap: of the first attempt.
        bridge: carries requests to the current leader rank.
        log_access: receives a line about each finished request, in the event loop.
        tell: sends an event to the supervisor.
    """

    def __init__(
        self,
        bootstrap: Bootstrap,
        bridge: EngineBridge,
        log_access: Callable[[str], None] = lambda line: None,
        tell: Callable[[TlsCertificate | LogLine], None] = lambda event: None,
    ) -> None:
        self.bridge = bridge
        self.watch = RunWatch(bootstrap, bridge)
        """What the API tells about the ranks; the guards' reports go there."""
        self.keys = KeyRing()
        """The keys that requests may be sent with."""
        if (endpoint := bootstrap.http) is not None:
            self.keys = KeyRing(endpoint.api_key, endpoint.keys)
        self._log_access = log_access
        self._tell = tell
        self._tls: ServerTls | None = None
        self.url = ""
        self._bootstrap = bootstrap
        self._endpoint = bootstrap.http
        self._listener: socket.socket | None = None
        self._server: Any = None
        self._reader: KillableReader | ProcessReader | None = None
        self._closing = False
        self._answering = asyncio.Event()
        self._serving: asyncio.Task[None] | None = None

    def open(self) -> None:
        """Bind the port and begin to serve; do nothing if that was done.

        Raises:
            ClusterError: if the port is taken, the address is not this machine's, or the TLS
                certificate cannot be used.
        """
        if self._endpoint is None or self._serving is not None:
            return
        self._tls = _load_tls(self._endpoint)
        self._listener, port = _take_port(self._endpoint)
        node = self._bootstrap.assignment.nodes[0]
        scheme = "http" if self._tls is None else "https"
        self.url = api_url(self._endpoint.host, port, node, scheme)
        self._serving = asyncio.create_task(self._serve(self._listener))

    async def _serve(self, listener: socket.socket) -> None:
        """Serve once the model's tokenizer and templates are known to be harmless.

        They are read here only after a process that can be killed has tried them. That process must
        also have read a request.
        """
        self._reader = reader = await asyncio.to_thread(_first_reader, self._bootstrap)
        if self._closing:
            return
        await reader.start()
        await asyncio.gather(reader.load(), asyncio.to_thread(_import_server))
        self._server, self._reader = _, requests = await asyncio.to_thread(
            _build_server,
            self._bootstrap,
            self.bridge,
            reader,
            self.keys,
            self._tls,
            self.watch,
            self._log_access,
        )
        await requests.check()
        if self._closing:
            return  # ``close`` was called meanwhile and has closed the listener
        tasks = [asyncio.create_task(self._server.serve(sockets=[listener]))]
        try:
            while not self._server.started and not tasks[0].done():
                await asyncio.sleep(0.01)
            if self._server.started:
                # uvicorn lets asyncio shorten the queue to what it accepts in one turn. If more
                # clients come at once, Linux loses connections that they believe to be open.
                listener.listen(_WAITING_CONNECTIONS)
            tasks.append(asyncio.create_task(self._follow_certificate()))
            self._answering.set()
            await tasks[0]
        finally:  # ``close`` may have been called at any of these moments
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _follow_certificate(self) -> None:
        """Tell the supervisor the certificate, and take renewed ones into use."""
        tls, node = self._tls, self._bootstrap.assignment.nodes[0]
        if tls is None:
            return
        self._tell(TlsCertificate(tls.chain))
        while True:
            await asyncio.sleep(RENEWAL_SECONDS)
            try:
                if await asyncio.to_thread(tls.renew):
                    self._tell(TlsCertificate(tls.chain))
                    said = f"renewed TLS certificate, valid until {expiry_date(tls.report)}"
                    self._tell(LogLine(0, node, "guard", said))
            except K2Error as error:
                said = f"the TLS certificate stays as it was: {error.message}"
                self._tell(LogLine(0, node, "guard", said))

    async def wait_until_closed(self) -> None:
        """Wait for the end of serving.

        Raises:
            K2Error: if the application cannot be made from this checkpoint.
        """
        if self._serving is not None:
            await asyncio.shield(self._serving)

    async def wait_until_answering(self) -> None:
        """Wait until requests are answered; return at once for a run without an API."""
        if self._endpoint is not None:
            await self._answering.wait()

    async def close(self) -> None:
        """Stop taking requests and give open ones a moment to send what they have."""
        if self._serving is None:
            return
        self._closing = True
        if self._server is not None:
            self._server.should_exit = True
            await asyncio.sleep(0)
        elif self._listener is not None:
            self._listener.close()
        if self._answering.is_set():
            await asyncio.wait([self._serving], timeout=_CLOSE_SECONDS)
        self._serving.cancel()
        with contextlib.suppress(asyncio.CancelledError, Exception):
            await self._serving
        if self._listener is not None:
            self._listener.close()  # as it was not if the server had not taken it over yet
        if self._reader is not None:
            await self._reader.close()
