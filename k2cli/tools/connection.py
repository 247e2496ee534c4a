"""One MCP server of a chat: the handshake, its tools, and calls of them.

Results are not compared with the output schema that a server gives for itself: a regular expression
in it could run for hours, and nothing could end it.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import anyio
import httpx2
import mcp_types
from mcp import ClientSession
from mcp.client.streamable_http import streamable_http_client
from mcp.shared.exceptions import MCPError

from k2cli import __version__
from k2cli.files import decode_json
from k2cli.tools.messages import Call, CallDone, ToolInfo
from k2cli.tools.program import Program, started
from k2cli.tools.results import MOST_TOOLS, checked_tools, cut_result, result_text
from k2cli.tools.settings import ServerSettings
from k2cli.units import MIB, format_bytes

CONNECT_SECONDS = 30.0
_MOST_BODY_BYTES = 8 * MIB
_MOST_PAGES = 10
_MOST_BLOCKS = 1000
_LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})


class _CallResult(mcp_types.Result):
    """The result of a call, with blocks as they came: to check 100,000 of them takes seconds."""

    content: list[Any]
    structured_content: Any = None
    is_error: bool = False


class Connection:
    """A server that has listed its tools."""

    def __init__(
        self, settings: ServerSettings, session: ClientSession, program: Program | None
    ) -> None:
        self._settings = settings
        self._session = session
        self._program = program
        self.tools: list[ToolInfo] = []
        self.left_out: list[str] = []

    async def list_tools(self) -> None:
        """Ask for the tools, page by page."""
        listed: list[Any] = []
        cursor: str | None = None
        for _ in range(_MOST_PAGES):
            params = mcp_types.PaginatedRequestParams(cursor=cursor)
            page = await self._session.send_request(
                mcp_types.ListToolsRequest(params=params), mcp_types.ListToolsResult
            )
            listed += [tool.model_dump(by_alias=True, mode="json") for tool in page.tools]
            cursor = page.next_cursor
            if cursor is None or len(listed) > MOST_TOOLS:
                break
        self.tools, self.left_out = checked_tools(listed)

    async def call(self, call: Call) -> CallDone:
        """Call a tool.

        Raises:
            Exception: of any kind, if it fails; ``reason_of`` describes it.
        """
        params = mcp_types.CallToolRequestParams(
            name=call.tool, arguments=decode_json(call.arguments, type=dict[str, Any])
        )
        async with asyncio.timeout(self._settings.timeout_seconds):
            result = await self._session.send_request(
                mcp_types.CallToolRequest(params=params), _CallResult
            )
        blocks, more = result.content[:_MOST_BLOCKS], len(result.content) - _MOST_BLOCKS
        if more > 0:
            blocks.append({"type": f"{more} more blocks"})
        text, size = cut_result(result_text(blocks, result.structured_content))
        return CallDone(call.number, text, result.is_error, size)

    @property
    def end_reason(self) -> str:
        """The reason for which the server is gone."""
        return "it closed the connection" if self._program is None else self._program.end_reason

    def reason_of(self, error: BaseException) -> str:
        """Describe why the connection or a call failed."""
        if isinstance(error, TimeoutError):
            return f"no answer within {self._settings.timeout_seconds:g} s"
        return failure_reason(error, self._program)


def failure_reason(error: BaseException, program: Program | None = None) -> str:
    """Describe a failure of a server in one line."""
    while isinstance(error, BaseExceptionGroup) and error.exceptions:
        error = error.exceptions[0]
    if program is not None and (program.problem or isinstance(error, anyio.ClosedResourceError)):
        return program.end_reason
    if isinstance(error, MCPError) and "closed" in str(error).lower() and program is not None:
        return program.end_reason
    if isinstance(error, FileNotFoundError | PermissionError):
        return f"'{error.filename}' cannot be started: {error.strerror}"
    if isinstance(error, httpx2.TimeoutException):
        return "it did not answer in time"
    if isinstance(error, TimeoutError):
        return f"it did not answer within {CONNECT_SECONDS:.0f} s"
    if type(error).__name__ == "ValidationError":
        return "it sent an answer that MCP does not allow"
    return (str(error).splitlines() or [""])[0][:500] or type(error).__name__


@asynccontextmanager
async def connected(settings: ServerSettings) -> AsyncIterator[tuple[Connection, asyncio.Event]]:
    """Connect to a server and list its tools; yield an event that is set once it is gone.

    Raises:
        Exception: of any kind, if that fails; ``failure_reason`` describes it.
    """
    gone = asyncio.Event()
    async with contextlib.AsyncExitStack() as stack:
        program: Program | None = None
        if settings.command:
            program, receiving, sending = await stack.enter_async_context(started(settings))
        else:
            client = await stack.enter_async_context(_http_client(settings))
            receiving, sending = await stack.enter_async_context(
                streamable_http_client(settings.url, http_client=client)
            )
        watched = _Watched(receiving, gone)
        info = mcp_types.Implementation(name="k2", version=__version__)
        session = await stack.enter_async_context(ClientSession(watched, sending, client_info=info))
        connection = Connection(settings, session, program)
        try:
            async with asyncio.timeout(CONNECT_SECONDS):
                await session.initialize()
                await connection.list_tools()
        except Exception as error:
            raise ConnectionError(failure_reason(error, program)) from error
        yield connection, gone


class _Watched:
    """A stream of messages that sets an event at its end."""

    def __init__(self, stream: Any, gone: asyncio.Event) -> None:
        self._stream = stream
        self._gone = gone

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def __aiter__(self) -> _Watched:
        return self

    async def __anext__(self) -> Any:
        try:
            return await self._stream.__anext__()
        except StopAsyncIteration:
            self._gone.set()
            raise

    async def receive(self) -> Any:
        try:
            return await self._stream.receive()
        except (anyio.EndOfStream, anyio.ClosedResourceError):
            self._gone.set()
            raise

    async def __aenter__(self) -> _Watched:
        await self._stream.__aenter__()
        return self

    async def __aexit__(self, *exception: object) -> Any:
        return await self._stream.__aexit__(*exception)


# --- servers at a URL ---------------------------------------------------------------------------


class _BoundedBody(httpx2.AsyncByteStream):
    """Body of an answer that fails once it is too long."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    async def __aiter__(self) -> AsyncIterator[bytes]:
        size = 0
        async for chunk in self._stream:
            size += len(chunk)
            if size > _MOST_BODY_BYTES:
                raise httpx2.ReadError(
                    f"the server sent an answer of more than {format_bytes(_MOST_BODY_BYTES)}"
                )
            yield chunk

    async def aclose(self) -> None:
        await self._stream.aclose()


async def _limit_body(response: httpx2.Response) -> None:
    # Streams of events have a limit per event, and may go on for hours.
    if not response.headers.get("content-type", "").startswith("text/event-stream"):
        response.stream = _BoundedBody(response.stream)


def _http_client(settings: ServerSettings) -> httpx2.AsyncClient:
    return httpx2.AsyncClient(
        headers=settings.headers,
        timeout=httpx2.Timeout(settings.timeout_seconds, connect=10.0),
        trust_env=httpx2.URL(settings.url).host not in _LOOPBACK,
        event_hooks={"response": [_limit_body]},
    )
