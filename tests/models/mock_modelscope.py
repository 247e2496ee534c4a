"""A ModelScope on this machine for its real client, with one repository.

The routes are those that ``modelscope_hub`` 0.5 asks for: ``/api/v1/models/OWNER/NAME/repo/files``
for the list and ``.../repo?Revision=R&FilePath=P`` for bytes. The form of the list is the one that
the client reads. Large files are redirected, as to ModelScope's store.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

TOKEN = "ms-0123456789abcdef"
_LARGE_BYTES = 100_000


@dataclass
class MockModelScope:
    """State of the served repository ``mock/model``; ``revisions`` maps names to their files.

    ``names_commits`` is False for a server whose list says nothing about commits.
    """

    revisions: dict[str, dict[str, bytes]]
    commit: str = "c" * 40
    names_commits: bool = True
    private: bool = False
    fault: str = ""
    requested: list[str] = field(default_factory=list)
    tokens: list[str] = field(default_factory=list)
    sent_bytes: int = 0
    address: str = ""

    def entry(self, name: str, data: bytes) -> dict[str, object]:
        """Describe a file as the list does."""
        found: dict[str, object] = {
            "Name": name.rpartition("/")[2], "Path": name, "Size": len(data), "Type": "blob",
            "Sha256": hashlib.sha256(data).hexdigest(), "IsLFS": len(data) > _LARGE_BYTES,
        }  # fmt: skip
        if self.names_commits:
            first = name != sorted(self.revisions["master"])[0]
            found |= {"Revision": "b" * 40 if first else self.commit}
            found |= {"CommittedDate": 1_760_000_000 if first else 1_760_000_100}
        return found


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    scope: MockModelScope

    def do_GET(self) -> None:
        scope, parts = self.scope, urlsplit(self.path)
        query = {name: values[0] for name, values in parse_qs(parts.query).items()}
        scope.requested.append(f"{parts.path} {query.get('FilePath', '')}".strip())
        if parts.path.startswith("/store/"):
            scope.tokens.append(f"store {self.headers.get('Authorization', '')}")
            self._send_range(scope.revisions[query["r"]][parts.path.split("/", 2)[2]])
            return
        if scope.private and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._send(403, b'{"Code": 10010205001, "Message": "no access"}')
            return
        files = scope.revisions.get(query.get("Revision", ""))
        route = parts.path.removeprefix("/api/v1/models/mock/model/")
        if route not in ("repo", "repo/files") or files is None:
            self._send(404, b'{"Code": 10010205001, "Message": "not found"}')
        elif route == "repo/files":
            self._send_list(files)
        else:
            self._send_file(query["FilePath"], query["Revision"], files)

    def _send_list(self, files: dict[str, bytes]) -> None:
        if self.scope.fault == "is a page":
            self._send(200, b"<html>log in to this network</html>")
            return
        listed = [self.scope.entry(name, data) for name, data in files.items()]
        listed.append({"Name": "sub", "Path": "sub", "Size": 0, "Type": "tree"})
        self._send(200, json.dumps({"Code": 200, "Data": {"Files": listed}}).encode())

    def _send_file(self, name: str, revision: str, files: dict[str, bytes]) -> None:
        data = files.get(name)
        if data is None:
            self._send(404, b"{}")
        elif len(data) > _LARGE_BYTES:
            # Another host, by its name, so that tokens must not follow.
            place = self.scope.address.replace("127.0.0.1", "localhost")
            self._send(302, b"", {"Location": f"{place}/store/{name}?r={revision}&Signature=s3"})
        else:
            self._send_range(data)

    def _send_range(self, data: bytes) -> None:
        if self.scope.fault == "damages":
            data = data[:-1] + bytes([data[-1] ^ 1])
        match = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        assert match is not None, "k2 always asks for a range"
        first, last = int(match[1]), min(int(match[2]), len(data) - 1)
        part = data[first : last + 1]
        self.scope.sent_bytes += len(part)
        self._send(206, part, {"Content-Range": f"bytes {first}-{last}/{len(data)}"})

    def _send(self, status: int, data: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        try:
            self.wfile.write(data)
        except OSError:
            self.close_connection = True

    def log_message(self, format: str, *arguments: object) -> None:
        """Suppress the log."""


@contextmanager
def served_modelscope(scope: MockModelScope) -> Iterator[MockModelScope]:
    """Serve it on a free port of loopback; ``address`` is set."""
    handler = type("Handler", (_Handler,), {"scope": scope})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        scope.address = f"http://127.0.0.1:{server.server_port}"
        yield scope
    finally:
        server.shutdown()
        server.server_close()
        thread.join(timeout=10)
