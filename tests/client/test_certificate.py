"""Servers whose certificate the system does not know, and addresses with the wrong scheme."""

from __future__ import annotations

import http.server
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from k2cli.client.client import ApiClient
from k2cli.errors import ClusterError
from tests.support.certificates import Files, issue


class _Models(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        body = b'{"data": [{"id": "m"}]}'
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


class _Server(http.server.ThreadingHTTPServer):
    def handle_error(self, request: object, client_address: object) -> None:
        """Clients that do not trust the certificate close the connection."""


@contextmanager
def _serving(files: Files | None = None) -> Iterator[int]:
    with _Server(("127.0.0.1", 0), _Models) as server:
        if files is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(files.certificate, files.key)
            server.socket = context.wrap_socket(server.socket, server_side=True)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield server.server_port
        finally:
            server.shutdown()
            thread.join()


def _models(url: str) -> list[str]:
    with ApiClient(url) as client:
        return [model.name for model in client.models()]


def test_authorities_of_the_environment_count_on_this_machine_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = issue(tmp_path / "tls", "localhost")
    monkeypatch.delenv("SSL_CERT_FILE", raising=False)
    with _serving(files) as port:
        with pytest.raises(ClusterError, match="is not accepted: ") as caught:
            _models(f"https://localhost:{port}")
        hint = f"SSL_CERT_FILE=ca.pem k2 chat --url https://localhost:{port}/v1"
        assert caught.value.hint == hint
        monkeypatch.setenv("SSL_CERT_FILE", str(files.authority))
        assert _models(f"https://localhost:{port}") == ["m"]
        with pytest.raises(ClusterError, match=r"is not accepted: .*127\.0\.0\.1"):
            _models(f"https://127.0.0.1:{port}")


def test_the_wrong_scheme_is_told(tmp_path: Path) -> None:
    with _serving() as port, pytest.raises(ClusterError, match="does not speak TLS") as caught:
        _models(f"https://127.0.0.1:{port}")
    assert caught.value.hint == f"k2 chat --url http://127.0.0.1:{port}/v1"
