"""A Hub on this machine for the real client: one repository, and the refusals there can be."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"

REFUSALS = {
    "gated/model": (403, "GatedRepo"),
    "absent/model": (401, "RepoNotFound"),
    "secret/model": (403, ""),
    "broken/model": (500, ""),
}


class _Handler(BaseHTTPRequestHandler):
    files: dict[str, bytes]
    requested: list[str]

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, *, body: bool) -> None:
        path = self.path.split("?")[0]
        self.requested.append(f"{self.command} {path}")
        for repo, (status, code) in REFUSALS.items():
            if repo in path:
                self._send(status, b'{"error": "no"}', body, {"X-Error-Code": code})
                return
        if path.startswith("/api/models/mock/model/revision/nowhere"):
            self._send(404, b"{}", body, {"X-Error-Code": "RevisionNotFound"})
        elif path.startswith("/api/models/mock/model/tree/"):
            self._send_json(self._tree(), body)
        elif path.startswith("/api/models/mock/model"):
            siblings = [{"rfilename": name} for name in self.files]
            document = {"id": "mock/model", "modelId": "mock/model", "sha": COMMIT}
            self._send_json(document | {"siblings": siblings, "tags": [], "private": False}, body)
        elif path.startswith("/mock/model/resolve/"):
            self._send_file(path.split("/", 5)[5], body)
        else:
            self._send(404, b"{}", body, {})

    def _tree(self) -> list[dict[str, object]]:
        return [
            {"type": "file", "path": name, "size": len(data), "oid": _etag(data)}
            for name, data in self.files.items()
        ]

    def _send_json(self, document: object, body: bool) -> None:
        self._send(200, json.dumps(document).encode(), body, {})

    def _send_file(self, name: str, body: bool) -> None:
        data = self.files.get(name)
        if data is None:
            self._send(404, b"", body, {"X-Error-Code": "EntryNotFound"})
            return
        headers = {"ETag": f'"{_etag(data)}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        self._send(200, data, body, headers)

    def _send(self, status: int, data: bytes, body: bool, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if body:
            self.wfile.write(data)

    def log_message(self, format: str, *arguments: object) -> None:
        """Say nothing."""


def _etag(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@contextmanager
def mock_hub(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """Serve ``folder`` as ``mock/model``; gives the address and the list of requests."""
    files = {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
    handler = type("Handler", (_Handler,), {"files": files, "requested": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", handler.requested  # type: ignore[attr-defined]
    finally:
        server.shutdown()
        server.server_close()
        thread.join(timeout=10)
