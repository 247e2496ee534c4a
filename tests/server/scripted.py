"""An engine that plays scripts, a tokenizer for it, and a real server on the loopback.

The engine is the seam between server and ranks, so tests of the server replace it and nothing
else: the HTTP server is uvicorn, the clients are real ones.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections import deque
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any

import uvicorn

from k2cli.access.key_ring import KeyRing
from k2cli.errors import K2Error
from k2cli.protocol import Finished, Generate, PromptProgress, RequestFailed, Tokens
from k2cli.server.app import create_app
from k2cli.server.engine_client import EngineEvent, EngineState, EngineUnavailable, RequestQueue
from k2cli.server.metrics.activity import Activity
from k2cli.server.metrics.run_view import RunSource
from k2cli.server.read_request import (
    ReadRequest,
    RequestKind,
    UnreadRequest,
    accepted,
    read_request,
)
from k2cli.server.reader_queues import RequestReader
from k2cli.server.served_model import ServedModel

START_SECONDS = 10
END_OF_TURN = 1


class LetterStream:
    """Detokenizes one code point per token; two tokens for one character beyond U+FFFF."""

    def __init__(self) -> None:
        self._half: int | None = None

    def push(self, token_id: int) -> str:
        if 0xD800 <= token_id < 0xDC00:
            self._half = token_id
            return ""
        if self._half is not None:
            high, self._half = self._half, None
            return chr(0x10000 + ((high - 0xD800) << 10) + (token_id - 0xDC00))
        return chr(token_id)

    def finish(self) -> str:
        return "" if self._half is None else "\ufffd"


class LetterTokenizer:
    """Token ids are UTF-16 code units: exact, and readable in a test."""

    stop_tokens = frozenset({END_OF_TURN})
    vocabulary_size = 0x10000
    shows_tools = True

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        data = text.encode("utf-16-le")
        ids = [int.from_bytes(data[i : i + 2], "little") for i in range(0, len(data), 2)]
        return [2, *ids] if add_special_tokens else ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        data = b"".join(token.to_bytes(2, "little") for token in ids)
        return data.decode("utf-16-le", errors="replace")

    def encode_within(
        self, text: str, max_tokens: int, add_special_tokens: bool = False
    ) -> list[int] | None:
        return self.encode(text, add_special_tokens)

    def chat_prompt(
        self,
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_last: bool = False,
        **template_arguments: Any,
    ) -> str:
        if messages[0]["role"] == "tool":
            raise K2Error("the chat template refuses a tool's message first")
        text = "".join(f"<{turn['role']}>{turn['content']}" for turn in messages)
        text += f"<tools:{len(tools)}>" if tools else ""
        text += "".join(f"<{name}={value}>" for name, value in template_arguments.items())
        return text + ("<assistant>" if add_generation_prompt else "")

    def stream(self) -> LetterStream:
        return LetterStream()


class InlineReader:
    """Reads requests in a thread of this process."""

    def __init__(self, tokenizer: Any, served: ServedModel) -> None:
        self._tokenizer = tokenizer
        self._served = served

    async def read(self, kind: RequestKind, body: bytes) -> ReadRequest:
        unread = UnreadRequest(kind, body)
        return accepted(
            await asyncio.to_thread(read_request, unread, self._tokenizer, self._served)
        )

    async def start(self) -> None:
        pass

    async def close(self) -> None:
        pass


class Hang:
    """Item of a script: send nothing more until the request is cancelled."""


Step = EngineEvent | Hang | Exception | float


class ScriptedEngine:
    """Plays one enqueued script per request; a float in it is a pause in seconds.

    Events are written for any request: their ``request_id`` is filled in. A cancelled request
    ends with ``Finished(reason="cancelled")``, as the protocol says.
    """

    def __init__(self) -> None:
        self.state: EngineState = "ready"
        self.cause = ""
        self.submitted: list[Generate] = []
        self.cancelled: list[str] = []
        self.cancellation = threading.Event()
        self._scripts: deque[Sequence[Step]] = deque()
        self._cancels: dict[str, asyncio.Event] = {}

    def enqueue(self, script: Sequence[Step]) -> None:
        self._scripts.append(script)

    def answer(self, text: str, *, size: int = 3, reason: Any = "stop") -> None:
        """Enqueue an ordinary answer, ``size`` tokens at a time."""
        tokens = LetterTokenizer().encode(text)
        steps: list[Step] = [PromptProgress("", 5, 5)]
        steps += [Tokens("", tokens[i : i + size]) for i in range(0, len(tokens), size)]
        self.enqueue([*steps, finished(len(tokens), reason)])

    def cancel(self, request_id: str) -> None:
        self.cancelled.append(request_id)
        self._cancels[request_id].set()
        self.cancellation.set()

    async def submit(self, request: Generate) -> AsyncIterator[EngineEvent]:
        self.submitted.append(request)
        cancelled = self._cancels.setdefault(request.request_id, asyncio.Event())
        for step in self._scripts.popleft():
            if isinstance(step, Exception):
                raise step
            if isinstance(step, float):
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(cancelled.wait(), step)
            elif isinstance(step, Hang):
                await cancelled.wait()
            else:
                await asyncio.sleep(0)
                yield _addressed(step, request.request_id)
            if cancelled.is_set():
                yield _addressed(finished(0, "cancelled"), request.request_id)
                return


def _addressed(event: EngineEvent, request_id: str) -> EngineEvent:
    members = {name: getattr(event, name) for name in event.__struct_fields__}
    return type(event)(**{**members, "request_id": request_id})


def finished(completion_tokens: int, reason: Any = "stop", **members: int) -> Finished:
    return Finished(
        request_id="",
        reason=reason,
        prompt_tokens=5,
        completion_tokens=completion_tokens,
        cached_tokens=1,
        queue_seconds=0.25,
        prefill_seconds=0.5,
        decode_seconds=2.0,
        **members,
    )


@contextlib.contextmanager
def serving(
    engine: ScriptedEngine,
    served: ServedModel,
    tokenizer: Any = None,
    reader: RequestReader | None = None,
    activity: Activity | None = None,
    run: RunSource | None = None,
    keys: KeyRing | None = None,
    port: int = 0,
    waiting: RequestQueue | None = None,
    **options: Any,
) -> Iterator[str]:
    """Run a real server in a thread; yields its base URL without ``/v1``."""
    tokenizer = tokenizer or LetterTokenizer()
    reader = reader or InlineReader(tokenizer, served)
    app = create_app(engine, tokenizer, served, reader, activity, run, keys, waiting)
    listener = socket.create_server(("127.0.0.1", port))
    config = uvicorn.Config(app, log_level="error", timeout_graceful_shutdown=2, **options)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(START_SECONDS)
        listener.close()


__all__ = [
    "EngineUnavailable",
    "Hang",
    "LetterTokenizer",
    "RequestFailed",
    "ScriptedEngine",
    "finished",
    "serving",
]
