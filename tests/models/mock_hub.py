"""A Hub on this machine for the real client, with one repository, refusals and faults.

A file may have a fault, of all its answers or, as in ``fails 2 times``, of the first ones:

* ``ignores ranges``, ``redirects`` (to another path of the same server, as the Hub does to its
  store), ``redirects away`` (to the server ``elsewhere``), ``refuses`` (403)
* ``breaks off`` (in the middle of an answer), ``sticks`` (likewise, and the connection stays),
  ``trickles``, ``never ends`` (sends more than it said, and goes on)
* ``fails`` (503), ``asks to wait`` (429 with ``Retry-After: 1``), ``asks for patience``
  (``Retry-After: 0``), ``leads nowhere`` (redirects to no address)
* ``damages`` (one byte is another), ``lies about its size``, ``has another etag``

``moved`` gives the repository a new commit with other files; the old one stays.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"
GOOD_TOKEN = "hf_goodtokengoodtokengoodtoken"

REFUSALS = {
    "gated/model": (403, "GatedRepo"),
    "absent/model": (401, "RepoNotFound"),
    "secret/model": (403, ""),
    "broken/model": (500, ""),
}
_STUCK_SECONDS = 60.0
_COUNTED_FAULT = re.compile(r"(.+?) (\d+) times?")


@dataclass(frozen=True)
class StoredFile:
    """A file on disk, for content that is too large for memory."""

    path: Path
    sha256: str

    def __len__(self) -> int:
        return self.path.stat().st_size


Content = bytes | StoredFile


@dataclass
class MockHub:
    """State of a served Hub; changes take effect at once."""

    files: dict[str, Content]
    faults: dict[str, str] = field(default_factory=dict)
    commit: str = COMMIT
    earlier: dict[str, dict[str, Content]] = field(default_factory=dict)
    elsewhere: str = ""
    requested: list[str] = field(default_factory=list)
    authorized: list[str] = field(default_factory=list)
    sent: list[int] = field(default_factory=list)
    address: str = ""

    def moved(self, files: dict[str, Content]) -> None:
        """Give the main branch a new commit with these files."""
        self.earlier[self.commit] = self.files
        self.files, self.commit = files, hashlib.sha1(self.commit.encode()).hexdigest()

    def take_fault(self, name: str) -> str:
        """Return the fault of the next answer for a file."""
        fault = self.faults.get(name, "")
        if (counted := _COUNTED_FAULT.fullmatch(fault)) is None:
            return fault
        left = int(counted[2]) - 1
        if left > 0:
            self.faults[name] = f"{counted[1]} {left} times"
        else:
            self.faults.pop(name, None)
        return counted[1]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: MockHub

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, *, body: bool) -> None:
        path = self.path.split("?")[0]
        self.hub.requested.append(f"{self.command} {path}")
        if token := self.headers.get("Authorization"):
            self.hub.authorized.append(f"{path} {token}")
        for repo, (status, code) in REFUSALS.items():
            if repo in path:
                if repo == "gated/model" and token == f"Bearer {GOOD_TOKEN}":
                    path = path.replace("gated/model", "mock/model")
                    break
                self._send(status, b'{"error": "no"}', body, {"X-Error-Code": code})
                return
        if path.startswith("/api/models/mock/model/revision/nowhere"):
            self._send(404, b"{}", body, {"X-Error-Code": "RevisionNotFound"})
        elif path.startswith("/api/models/mock/model/tree/"):
            self._send_json(self._tree(), body)
        elif path.startswith("/api/models/mock/model"):
            self._send_info(body)
        elif path.startswith("/store/"):
            self._send_file(path.split("/", 2)[2], self.hub.commit, body)
        elif path.startswith("/mock/model/resolve/"):
            _, _, _, _, revision, name = path.split("/", 5)
            self._send_file(name, revision, body)
        else:
            self._send(404, b"{}", body, {})

    def _send_info(self, body: bool) -> None:
        """Answer as ``/api/models/...``; sizes and hashes only where they are asked for."""
        fault = self.hub.take_fault("list")
        if fault == "fails":
            self._send(503, b"{}", body, {})
            return
        if fault == "is a page":
            self._send(200, b"<html>log in to this network</html>", body, {})
            return
        if fault == "names no file":
            nameless = {"id": "mock/model", "sha": self.hub.commit, "siblings": [{"rfilename": 5}]}
            self._send_json(nameless, body)
            return
        revision = self.path.split("?")[0].partition("/revision/")[2]
        commit = revision if revision in self.hub.earlier else self.hub.commit
        siblings = [
            {"rfilename": name, **(_metadata(name, data) if "blobs=" in self.path else {})}
            for name, data in self.hub.earlier.get(revision, self.hub.files).items()
        ]
        document = {"id": "mock/model", "modelId": "mock/model", "sha": commit}
        self._send_json(document | {"siblings": siblings, "tags": [], "private": False}, body)

    def _tree(self) -> list[dict[str, object]]:
        return [_tree_entry(name, data) for name, data in self.hub.files.items()]

    def _send_json(self, document: object, body: bool) -> None:
        self._send(200, json.dumps(document).encode(), body, {})

    def _send_file(self, name: str, revision: str, body: bool) -> None:
        files = self.hub.earlier.get(revision, self.hub.files)
        commit = revision if revision in self.hub.earlier else self.hub.commit
        data = files.get(name)
        if data is None:
            self._send(404, b"", body, {"X-Error-Code": "EntryNotFound"})
            return
        etag = _etag(name, data)
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        in_store = self.path.startswith("/store/")
        fault = self.hub.faults.get(name, "")
        if not fault.startswith("redirects"):
            fault = self.hub.take_fault(name) if body else fault
        if fault == "refuses":
            self._send(403, b"{}", body, {})
        elif fault == "fails":
            self._send(503, b"", body, {})
        elif fault == "asks to wait":
            self._send(429, b"", body, {"Retry-After": "1"})
        elif fault == "asks for patience":
            self._send(429, b"", body, {"Retry-After": "0"})
        elif fault == "leads nowhere":
            self._send(302, b"", body, headers | {"Location": "http://[nowhere"})
        elif fault == "has another etag":
            headers["ETag"] = f'"{"0" * len(etag)}"'
            self._send_part(data, body, headers, fault)
        elif fault.startswith("redirects") and not in_store:
            store = self.hub.elsewhere if fault == "redirects away" else ""
            location = f"{store}/store/{name}?signature=s3cret"
            linked = {"X-Linked-Etag": f'"{etag}"', "X-Linked-Size": str(len(data))}
            self._send(302, b"", body, headers | linked | {"Location": location})
        else:
            self._send_part(data, body, headers, fault)

    def _send_part(self, data: Content, body: bool, headers: dict[str, str], fault: str) -> None:
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        size = len(data) + (1000 if fault == "lies about its size" else 0)
        if asked is None or fault == "ignores ranges":
            self._send(200, data, body, headers, fault, part=(0, len(data)))
            return
        first = int(asked[1])
        last = min(int(asked[2] or len(data)), len(data) - 1)
        headers["Content-Range"] = f"bytes {first}-{last}/{size}"
        self._send(206, data, body, headers, fault, part=(first, last + 1))

    def _send(
        self,
        status: int,
        data: Content,
        body: bool,
        headers: dict[str, str],
        fault: str = "",
        part: tuple[int, int] | None = None,
    ) -> None:
        first, past_last = part or (0, len(data))
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if fault == "never ends":
            self.close_connection = True
        else:
            self.send_header("Content-Length", str(past_last - first))
        self.end_headers()
        if not body:
            return
        try:
            self._send_body(data, first, past_last, fault)
        except OSError:
            self.close_connection = True  # the client closed the connection

    def _send_body(self, data: Content, first: int, past_last: int, fault: str) -> None:
        if fault in ("breaks off", "sticks", "trickles"):
            self.close_connection = True
            past_last = first + (past_last - first) // 2
        if isinstance(data, StoredFile):
            self._send_stored(data, first, past_last)
        else:
            if fault == "damages" and past_last > first:
                changed = bytearray(data)
                changed[first] ^= 0xFF
                data = bytes(changed)
            for start in range(first, past_last, 2**16):
                self._write(data[start : min(start + 2**16, past_last)])
        if fault == "sticks":
            self._wait_for_client(_STUCK_SECONDS)
        for start in range(past_last, past_last + 100 if fault == "trickles" else past_last):
            self._write(data[start : start + 1])  # type: ignore[index]
            time.sleep(0.1)
        while fault == "never ends":
            self._write(bytes(2**16))

    def _write(self, data: bytes) -> None:
        self.wfile.write(data)
        self.hub.sent.append(len(data))

    def _wait_for_client(self, seconds: float) -> None:
        """Keep the connection silent until the client closes it."""
        self.connection.settimeout(seconds)
        self.connection.recv(1)

    def _send_stored(self, stored: StoredFile, first: int, past_last: int) -> None:
        with stored.path.open("rb") as file:
            while first < past_last:
                count = os.sendfile(
                    self.connection.fileno(), file.fileno(), first, min(2**20, past_last - first)
                )
                if count == 0:
                    return
                first += count
                self.hub.sent.append(count)

    def log_message(self, format: str, *arguments: object) -> None:
        """Suppress the log."""


def _git_sha1(data: Content) -> str:
    if isinstance(data, StoredFile):
        return data.sha256[:40]
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _is_in_lfs(name: str) -> bool:
    return name.endswith(".safetensors")


def _sha256(data: Content) -> str:
    return data.sha256 if isinstance(data, StoredFile) else hashlib.sha256(data).hexdigest()


def _etag(name: str, data: Content) -> str:
    return _sha256(data) if _is_in_lfs(name) else _git_sha1(data)


def _metadata(name: str, data: Content) -> dict[str, object]:
    """Describe a file as ``/api/models/...?blobs=true`` does."""
    found: dict[str, object] = {"size": len(data), "blobId": _git_sha1(data)}
    if _is_in_lfs(name):
        found["lfs"] = {"sha256": _sha256(data), "size": len(data), "pointerSize": 134}
    return found


def _tree_entry(name: str, data: Content) -> dict[str, object]:
    """Describe a file as ``/api/models/.../tree`` does."""
    entry = {"type": "file", "path": name, "size": len(data), "oid": _git_sha1(data)}
    if _is_in_lfs(name):
        entry["lfs"] = {"oid": _sha256(data), "size": len(data), "pointerSize": 134}
    return entry


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, request: object, client_address: object) -> None:
        """Say nothing: clients that are killed reset their connections."""

    def server_bind(self) -> None:
        # What a client never reads does not count as sent.
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2**17)
        super().server_bind()


@contextmanager
def served_hub(hub: MockHub) -> Iterator[MockHub]:
    """Serve a Hub on a free port of loopback; ``address`` is set."""
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = _Server(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        hub.address = f"http://127.0.0.1:{server.server_port}"
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join(timeout=10)


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
    files: dict[str, Content] = {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
    with hub_of(files, faults) as served:
        yield served


@contextmanager
def hub_of(
    files: dict[str, Content], faults: dict[str, str] | None = None
) -> Iterator[tuple[str, list[str], list[int]]]:
    """Run ``counting_hub`` on files in memory; changes of ``files`` take effect at once."""
    with served_hub(MockHub(files, dict(faults or {}))) as hub:
        yield hub.address, hub.requested, hub.sent
