"""An MCP server at a URL, made with the official library; it prints its port.

It answers only with the header that the settings of the test name.
"""

from __future__ import annotations

import socket
from typing import Any

import uvicorn
from mcp.server import MCPServer

server = MCPServer("web")


@server.tool()
def double(number: int) -> str:
    """Double a number."""
    return str(2 * number)


@server.tool()
def flood() -> str:
    """Return too much."""
    return "x" * 20_000_000


def guarded(app: Any) -> Any:
    async def call(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http" and (b"x-key", b"s3cret") not in scope["headers"]:
            await send({"type": "http.response.start", "status": 401, "headers": []})
            await send({"type": "http.response.body", "body": b""})
            return
        await app(scope, receive, send)

    return call


def main() -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    print(listener.getsockname()[1], flush=True)  # noqa: T201
    app = guarded(server.streamable_http_app())
    uvicorn.Server(uvicorn.Config(app, log_level="error")).run(sockets=[listener])


main()
