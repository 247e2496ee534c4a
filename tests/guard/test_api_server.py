"""The port of the API and the address that clients are given."""

from __future__ import annotations

import asyncio
import socket
import struct
import sys
from pathlib import Path
from typing import Any

import pytest

from k2cli.agent import ports
from k2cli.errors import ClusterError
from k2cli.guard import api_server
from k2cli.guard.api_server import ApiServer, _take_port, api_url
from k2cli.guard.engine_bridge import EngineBridge
from k2cli.protocol import Assignment, Bootstrap, HttpEndpoint
from tests.support.bootstraps import make_assignment, make_bootstrap


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("127.0.0.1", "http://127.0.0.1:80"),
        ("0.0.0.0", "http://studio:80"),
        ("::", "http://studio:80"),
        ("::1", "http://[::1]:80"),
        ("studio.local", "http://studio.local:80"),
    ],
)
def test_a_wildcard_is_no_address_for_a_client(host: str, url: str) -> None:
    assert api_url(host, 80, "studio") == url


def test_a_port_taken_meanwhile_is_passed_over_unless_it_was_asked_for() -> None:
    (port,) = ports.free_ports(1)
    with socket.create_server(("127.0.0.1", port)):
        with pytest.raises(ClusterError, match=f"cannot listen on 127.0.0.1:{port}"):
            _take_port(HttpEndpoint("127.0.0.1", port))
        listener, found = _take_port(HttpEndpoint("127.0.0.1", port, next_port_will_do=True))
        listener.close()
        assert found > port
    with pytest.raises(ClusterError, match=r"192\.0\.2\.1"):
        _take_port(HttpEndpoint("192.0.2.1", port, next_port_will_do=True))


@pytest.mark.skipif(sys.platform != "linux", reason="reads the length of the queue as Linux has it")
def test_many_connections_may_wait_to_be_accepted(toy_k2: Path) -> None:
    """uvicorn and asyncio shorten the queue to what they accept at once, which loses the others."""
    assignment = Assignment(
        "demo-1", 0, 1, ["localhost"], "local", str(toy_k2), "single", [(0, 1)], "float32", 64, 1,
        16, [1],
    )  # fmt: skip
    bootstrap = Bootstrap(
        assignment, "ab" * 32, "127.0.0.1", 0, "toy", HttpEndpoint("127.0.0.1", 0)
    )

    async def waiting_connections() -> int:
        server = ApiServer(bootstrap, EngineBridge(lambda message: None))
        server.open()
        try:
            await asyncio.wait_for(server.wait_until_answering(), 60)
            assert server._listener is not None
            state = server._listener.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 64)
            (longest,) = struct.unpack_from("I", state, 28)  # tcpi_sacked of a listening socket
            return int(longest)
        finally:
            await server.close()

    assert asyncio.run(waiting_connections()) >= 128


class _Step:
    """A part of the start that is reached, and then takes for ever."""

    def __init__(self) -> None:
        self.reached = asyncio.Event()

    async def __call__(self) -> None:
        self.reached.set()
        await asyncio.Event().wait()


async def _nothing() -> None:
    pass


@pytest.mark.parametrize("moment", ["start", "load", "check", "serve"])
async def test_an_api_that_is_closed_at_any_moment_of_its_start_leaves_nothing(
    moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed: list[str] = []

    class Part:
        """The reader process, the readers of requests, and uvicorn's server."""

        started = should_exit = False

        async def close(self) -> None:
            closed.append("reader")

        async def serve(self, sockets: list[socket.socket]) -> None:
            try:
                await steps["serve"]()
            finally:
                closed.append("server")

    step = _Step()
    steps: dict[str, Any] = {name: _nothing for name in ("start", "load", "check", "serve")}
    steps[moment] = step
    part: Any = Part()
    for name in ("start", "load", "check"):
        monkeypatch.setattr(part, name, steps[name], raising=False)
    monkeypatch.setattr(api_server, "_first_reader", lambda bootstrap: part)
    monkeypatch.setattr(api_server, "_import_server", lambda: None)
    monkeypatch.setattr(api_server, "_build_server", lambda *parts: (part, part))
    endpoint = HttpEndpoint("127.0.0.1", 0)
    server = ApiServer(
        make_bootstrap(make_assignment(), http=endpoint), EngineBridge(lambda message: None)
    )
    server.open()
    listener = server._listener
    assert listener is not None
    async with asyncio.timeout(20):
        await step.reached.wait()
        await server.close()
    assert listener.fileno() == -1
    assert closed == (["server", "reader"] if moment == "serve" else ["reader"])
    assert {asyncio.current_task()} == asyncio.all_tasks()
