"""A Hub on this machine for planners that read from nothing else: one folder as ``mock/model``.

Files are read from disk range by range, so that sparse shards of gigabytes are never in memory.
"""

from __future__ import annotations

import json
import re
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from math import prod
from pathlib import Path

MODEL_ID = "mock/model"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
MOST_BYTES = 16_000_000  # in one answer: a planner that wants more downloads the model


class _Handler(BaseHTTPRequestHandler):
    folder: Path
    elements: dict[str, int]

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, *, body: bool) -> None:
        path = self.path.split("?")[0]
        file = re.fullmatch(rf"/{MODEL_ID}/(?:resolve|raw)/[^/]+/([^/]+)", path)
        if re.fullmatch(rf"/api/models/{MODEL_ID}/tree/[^/]+/?", path):
            self._send(200, json.dumps(self._tree()).encode(), body)
        elif re.fullmatch(rf"/api/models/{MODEL_ID}(/revision/[^/]+)?", path):
            self._send(200, json.dumps(self._description()).encode(), body)
        elif file is not None and (self.folder / file[1]).is_file():
            self._send_file(self.folder / file[1], body)
        else:
            self._send(404, b"{}", body, {"X-Error-Code": "EntryNotFound"})

    def _tree(self) -> list[dict[str, object]]:
        return [
            {"type": "file", "path": path.name, "size": path.stat().st_size, "oid": COMMIT}
            for path in sorted(self.folder.iterdir())
        ]

    def _description(self) -> dict[str, object]:
        files = [{"rfilename": entry["path"], "size": entry["size"]} for entry in self._tree()]
        config = json.loads((self.folder / "config.json").read_text())
        return {
            "id": MODEL_ID, "modelId": MODEL_ID, "sha": COMMIT, "siblings": files, "config": config,
            "tags": ["safetensors"], "private": False, "gated": False,
            "safetensors": {"parameters": self.elements, "total": sum(self.elements.values())},
            "library_name": "transformers", "pipeline_tag": "text-generation",
        }  # fmt: skip

    def _send_file(self, path: Path, body: bool) -> None:
        size = path.stat().st_size
        headers = {"ETag": f'"{COMMIT}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        first, last, status = 0, size - 1, 200
        if asked is not None:
            first, last, status = int(asked[1]), min(int(asked[2] or size - 1), size - 1), 206
            headers["Content-Range"] = f"bytes {first}-{last}/{size}"
        if not body:
            self._send(status, b"", body, headers, length=last - first + 1)
            return
        if last - first + 1 > MOST_BYTES:
            self._send(403, b"{}", body)
            return
        with path.open("rb") as stream:
            stream.seek(first)
            self._send(status, stream.read(last - first + 1), body, headers)

    def _send(
        self,
        status: int,
        data: bytes,
        body: bool,
        headers: dict[str, str] | None = None,
        length: int | None = None,
    ) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data) if length is None else length))
        self.end_headers()
        try:
            if body:
                self.wfile.write(data)
        except OSError:
            self.close_connection = True  # the planner had enough

    def log_message(self, format: str, *arguments: object) -> None:
        """Say nothing."""


def _elements(folder: Path) -> dict[str, int]:
    """Stored elements by type, as the Hub's description of a model counts them."""
    counts: dict[str, int] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as stream:
            header = json.loads(stream.read(struct.unpack("<Q", stream.read(8))[0]))
        header.pop("__metadata__", None)
        for tensor in header.values():
            counts[tensor["dtype"]] = counts.get(tensor["dtype"], 0) + prod(tensor["shape"])
    return counts


@contextmanager
def local_hub(folder: Path) -> Iterator[str]:
    """Serve ``folder`` as ``mock/model`` on 127.0.0.1; gives the address for ``HF_ENDPOINT``."""
    handler = type("Handler", (_Handler,), {"folder": folder, "elements": _elements(folder)})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join(timeout=10)
