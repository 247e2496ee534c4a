"""The port of the API and the address that clients are given."""

from __future__ import annotations

import socket

import pytest

from k2cli.agent import ports
from k2cli.errors import ClusterError
from k2cli.guard.api_server import _take_port, api_url
from k2cli.protocol import HttpEndpoint


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
