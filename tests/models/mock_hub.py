"""A Hub on this machine for the real client, with one repository, refusals and faults.

A file may have a fault: ``ignores ranges``, ``breaks off`` (in the middle of an answer),
``redirects`` (to another path, as the Hub does to its store), ``refuses`` (403) or ``fails once``
(503, then as it should).
"""

from __future__ import annotations

import hashlib
import json
import re
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
    faults: dict[str, str]
    sent: list[int]

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
            siblings = [
                {"rfilename": name, **(_metadata(name, data) if "blobs=" in self.path else {})}
                for name, data in self.files.items()
            ]
            document = {"id": "mock/model", "modelId": "mock/model", "sha": COMMIT}
            self._send_json(document | {"siblings": siblings, "tags": [], "private": False}, body)
        elif path.startswith("/store/"):
            self._send_file(path.split("/", 2)[2], body)
        elif path.startswith("/mock/model/resolve/"):
            self._send_file(path.split("/", 5)[5], body)
        else:
            self._send(404, b"{}", body, {})

    def _tree(self) -> list[dict[str, object]]:
        return [
            {"type": "file", "path": name, "size": len(data), "oid": _git_sha1(data)}
            for name, data in self.files.items()
        ]

    def _send_json(self, document: object, body: bool) -> None:
        self._send(200, json.dumps(document).encode(), body, {})

    def _send_file(self, name: str, body: bool) -> None:
        data = self.files.get(name)
        if data is None:
            self._send(404, b"", body, {"X-Error-Code": "EntryNotFound"})
            return
        headers = {
            "ETag": f'"{_etag(name, data)}"',
            "X-Repo-Commit": COMMIT,
            "Accept-Ranges": "bytes",
        }
        fault = self.faults.get(name, "")
        if fault == "refuses":
            self._send(403, b"{}", body, {})
        elif fault == "fails once":
            del self.faults[name]
            self._send(503, b"", body, {})
        elif fault == "redirects" and not self.path.startswith("/store/"):
            self._send(302, b"", body, headers | {"Location": f"/store/{name}"})
        else:
            self._send_part(data, body, headers, fault)

    def _send_part(self, data: bytes, body: bool, headers: dict[str, str], fault: str) -> None:
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if asked is None or fault == "ignores ranges":
            self._send(200, data, body, headers, fault)
            return
        first, last = int(asked[1]), min(int(asked[2]), len(data) - 1)
        headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
        self._send(206, data[first : last + 1], body, headers, fault)

    def _send(
        self, status: int, data: bytes, body: bool, headers: dict[str, str], fault: str = ""
    ) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if not body:
            return
        if fault == "breaks off":
            data = data[: len(data) // 2]
            self.close_connection = True
        try:
            for start in range(0, len(data), 2**16):
                self.wfile.write(data[start : start + 2**16])
                self.sent.append(len(data[start : start + 2**16]))
        except OSError:
            self.close_connection = True  # the client closed the connection

    def log_message(self, format: str, *arguments: object) -> None:
        """Suppress the log."""


def _git_sha1(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _is_in_lfs(name: str) -> bool:
    return name.endswith(".safetensors")


def _etag(name: str, data: bytes) -> str:
    return hashlib.sha256(data).hexdigest() if _is_in_lfs(name) else _git_sha1(data)


def _metadata(name: str, data: bytes) -> dict[str, object]:
    """Describe a file as ``/api/models/...?blobs=true`` does."""
    found: dict[str, object] = {"size": len(data), "blobId": _git_sha1(data)}
    if _is_in_lfs(name):
        digest = hashlib.sha256(data).hexdigest()
        found["lfs"] = {"sha256": digest, "size": len(data), "pointerSize": 134}
    return found


@contextmanager
def mock_hub(folder: Path, faults: dict[str, str] | None = None) -> Iterator[tuple[str, list[str]]]:
    """Serve ``folder`` as ``mock/model``; yield the address and the list of requests."""
    with counting_hub(folder, faults) as (address, requested, _):
        yield address, requested


@contextmanager
def counting_hub(
    folder: Path, faults: dict[str, str] | None = None
) -> Iterator[tuple[str, list[str], list[int]]]:
    """Run ``mock_hub``; also yield the sizes of all pieces of bodies that were sent."""
    files = {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
    with hub_of(files, faults) as served:
        yield served


@contextmanager
def hub_of(
    files: dict[str, bytes], faults: dict[str, str] | None = None
) -> Iterator[tuple[str, list[str], list[int]]]:
    """Run ``counting_hub`` on files in memory; changes of ``files`` take effect at once."""
    state = {"files": files, "requested": [], "faults": dict(faults or {}), "sent": []}
    handler = type("Handler", (_Handler,), state)
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        address = f"http://127.0.0.1:{server.server_port}"
        yield address, handler.requested, handler.sent  # type: ignore[attr-defined]
    finally:
        server.shutdown()
        server.server_close()
        thread.join(timeout=10)
