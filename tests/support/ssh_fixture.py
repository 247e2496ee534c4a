"""Fixtures for a node on this machine that is reached with the real OpenSSH."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from k2cli.nodes.ssh_connection import close_connections
from tests.support.ssh_server import MISSING, Server, running_server


@pytest.fixture(scope="session")
def running_ssh_server(
    _isolated_session: None, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    with running_server(tmp_path_factory.mktemp("ssh")) as server:
        yield server


@pytest.fixture
def ssh_server(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """Start a server that ``ssh b`` reaches; close this process's connections afterwards."""
    if MISSING:
        pytest.skip("OpenSSH's client and server are needed")
    server: Server = request.getfixturevalue("running_ssh_server")
    monkeypatch.setenv("PATH", f"{server.folder}/bin:{os.environ['PATH']}")
    server.write_configuration()
    yield server
    close_connections()
