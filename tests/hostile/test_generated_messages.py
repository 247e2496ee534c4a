"""Generated messages between processes, and answers of other servers.

A guard or a rank that gets something else than the protocol's messages loses that connection; it
never ends with an error of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import threading
from collections.abc import AsyncIterator, Callable
from random import Random
from typing import Any

import msgspec
import pytest

from k2cli.client.answers import error_message, events
from k2cli.client.client import _completion
from k2cli.guard.supervisor_pipe import SupervisorPipe
from k2cli.launch.guard_commands import GuardCommand
from k2cli.nodes.node import _STREAM_LIMIT_BYTES
from k2cli.protocol import (
    Finished,
    Generate,
    GuardStarted,
    Heartbeat,
    KeyLimits,
    LoadProgress,
    LogLine,
    NamedKey,
    NamedKeys,
    NextAttempt,
    RankFailed,
    RankReady,
    RequestFailed,
    RunEnded,
    RunEvent,
    RunReady,
    Sampling,
    StopRun,
    SupervisorMessage,
    TlsCertificate,
    TokenLogprob,
    Tokens,
)
from k2cli.protocol.decisions import (
    Decision,
    Decode,
    FollowerMessage,
    HeldTensor,
    Hello,
    Holdings,
    OpenSequence,
    PrefillTogether,
    StepDigest,
)
from k2cli.protocol.liveness import ControlEndpoint, LivenessMessage, RankStatus
from k2cli.protocol.rank import GuardMessage, KvCacheUse, RankMessage
from k2cli.protocol.wire import LENGTH, Channel, ConnectionLost, frame
from k2cli.protocol.wire_streams import AsyncChannel
from k2cli.supervisor.processes import Processes
from k2cli.supervisor.start import _EventFile
from tests.hostile.mutation import (
    bounded,
    damaged,
    generated,
    mutated,
    mutated_json,
    plain,
    reads_or_refuses,
)
from tests.hostile.test_generated_runs import BOOTSTRAP

CONVERSATIONS: list[tuple[Any, list[Any]]] = [
    (GuardMessage, [
        Heartbeat(), Generate("r", [1, 2], 4, Sampling(0.5, seed=1, logit_bias={5: 1.0}), [1]),
    ]),
    (RankMessage, [
        Tokens("r", [1], [TokenLogprob(-0.5, [(1, -0.5)])]), RequestFailed("r", "e", "capacity"),
        Finished("r", "stop", 1, 2, 3, 0.1, 0.2, 0.3), RankReady(0, 1, 2, 3, 0.5),
        KvCacheUse(1, 256, 512, 4096),
    ]),
    (Decision, [
        OpenSequence(1, 2, 3, 4, [3]), PrefillTogether(1, 2, [3, 4], [[5], [6]]),
        Decode(1, 2, [3], told=[4]),
    ]),
    (FollowerMessage, [
        Hello(1), Holdings(1, [HeldTensor("a", [1, 2], "float16", 4)]), StepDigest(1, 2, "a"),
    ]),
    (LivenessMessage, [
        RankStatus(0, 1, "busy", 3, 4), ControlEndpoint("h", 80), LogLine(0, "n", "rank", "text"),
        RankFailed(0, "n", "cause", -9, ["line"]), StopRun("c", failed=True),
    ]),
]  # fmt: skip
EVENTS: list[Any] = [
    GuardStarted(0, "n", 1, 2), LoadProgress(0, "loading", 1, 2), RankReady(0, 1, 2, 3, 0.5),
    RunReady("http://h:80"), LogLine(0, "n", "guard", "text"), RunEnded("cause", failed=True),
    RankFailed(0, "n", "cause", -9, ["line"]), TlsCertificate("-----BEGIN"),
]  # fmt: skip
NAMED_KEY = NamedKey("alice", "0" * 8, "5e" * 32, 1.8e9, 1.9e9, KeyLimits(2, 4, 60_000))
ORDERS: list[Any] = [Heartbeat(), StopRun("c", failed=True), NextAttempt(BOOTSTRAP),
                     NamedKeys([NAMED_KEY, NAMED_KEY])]  # fmt: skip
CHUNK: dict[str, Any] = {
    "id": "cmpl-1", "object": "text_completion", "model": "m",
    "choices": [{"index": 0, "text": "a", "delta": {"content": "b"}, "finish_reason": "stop"}],
    "k2": {"queue_position": 1, "prefill_done": 2, "prefill_total": 3, "completion_tokens": 4},
    "usage": {
        "prompt_tokens": 1, "completion_tokens": 4, "prompt_tokens_details": {"cached_tokens": 0},
        "timings": {"queue_seconds": 0.1, "prefill_seconds": 0.2, "decode_seconds": 0.3},
    },
}  # fmt: skip
DEEP = (b"\x91" * 100_000, b"\x81\xa1a" * 100_000, b"\xdd\xff\xff\xff\xff", b"\xc6\xff\xff\xff\xff")


def hostile_frame(message: Any, draw: Random) -> bytes:
    """Encode a changed message, and damage some of the bytes and lengths."""
    changed = plain(mutated(msgspec.to_builtins(message), draw))
    try:
        body = msgspec.msgpack.encode(changed)
    except (OverflowError, UnicodeEncodeError, RecursionError):
        body = msgspec.msgpack.encode(message)
    match draw.choice(("as it is", "damaged", "text", "deep")):
        case "damaged":
            body = damaged(body, draw)
        case "text":  # no UTF-8 in a string
            body = body.replace(draw.choice((b"type", b"r", b"n", b"cause")), b"\xff\xfe\xfd\xfc")
        case "deep":
            at = draw.randrange(len(body) + 1)
            body = body[:at] + draw.choice(DEEP) + body[at:]
    length = draw.choice((len(body),) * 9 + (0, 2**31, 2**32 - 1, len(body) + 1))
    return LENGTH.pack(length) + body


async def _lines(data: bytes) -> asyncio.StreamReader:
    reader = asyncio.StreamReader(limit=_STREAM_LIMIT_BYTES)
    reader.feed_data(data)
    reader.feed_eof()
    return reader


def send(connection: socket.socket, data: bytes) -> None:
    """Send bytes, of which the other side may not read all, and close."""
    with connection, contextlib.suppress(OSError):
        connection.sendall(data)


@pytest.mark.parametrize("number", range(len(CONVERSATIONS)))
@generated(200)
def test_frames(number: int, draw: Random) -> None:
    kinds, messages = CONVERSATIONS[number]
    data = hostile_frame(draw.choice(messages), draw) + frame(draw.choice(messages))

    def blocking() -> None:
        ours, theirs = socket.socketpair()
        sending = threading.Thread(target=send, args=(theirs, data))
        sending.start()
        try:
            channel: Channel[Any] = Channel(ours, kinds)
            while channel.receive(5.0) is not None:
                pass
        finally:
            ours.close()
            sending.join()

    async def streaming() -> None:
        channel: AsyncChannel[Any] = AsyncChannel(await _lines(data), None, kinds)  # type: ignore[arg-type]
        while True:
            await channel.receive()

    for read in (blocking, lambda: asyncio.run(streaming())):
        with bounded(), pytest.raises(ConnectionLost):
            read()


@generated(200)
def test_orders_of_the_supervisor(draw: Random) -> None:
    message = msgspec.to_builtins(draw.choice(ORDERS))
    data = mutated_json(message, draw).replace(b"\n", b" ") + b"\n" + b'{"type":"Heartbeat"}\n'

    async def read() -> list[SupervisorMessage]:
        pipe = SupervisorPipe(await _lines(data), None)  # type: ignore[arg-type]
        messages: AsyncIterator[SupervisorMessage] = pipe.messages()
        return [message async for message in messages]

    reads_or_refuses(lambda: asyncio.run(read()), "", ConnectionLost)


class _Journal:
    """Collects the lines that are no messages."""

    def __init__(self) -> None:
        self.lines: list[bytes] = []

    def log_line(self, command: GuardCommand, line: bytes) -> None:
        self.lines.append(line)


@generated(250)
def test_events_of_a_guard(draw: Random) -> None:
    """A line that is no event, from whatever writes to stdout, is a line of the log."""
    message = msgspec.to_builtins(draw.choice(EVENTS))
    data = mutated_json(message, draw).replace(b"\n", b" ")
    seen: list[RunEvent] = []
    journal = _Journal()
    not_needed: Any = None
    processes = Processes(journal, seen.append, not_needed, not_needed)  # type: ignore[arg-type]

    async def read() -> None:
        stream = await _lines(data + b"\n" + b'{"type":"RunReady","url":"last"}\n')
        await processes._read_events(not_needed, stream)

    with bounded():
        asyncio.run(read())
    assert seen[-1] == RunReady("last")
    assert len(seen) + len(journal.lines) == 2


@generated(150)
def test_file_of_events(tmp_path: Any, draw: Random) -> None:
    path = tmp_path / "events.jsonl"
    message = msgspec.to_builtins(draw.choice(EVENTS))
    path.write_bytes(mutated_json(message, draw).replace(b"\n", b" ") + b'\n{"type":"Heartbeat"}\n')
    with bounded():
        assert _EventFile(path).new()[-1] == Heartbeat()


@generated(300)
def test_answers_of_another_server(draw: Random) -> None:
    """``k2 chat`` and ``k2 bench`` may talk to any server."""
    chunk = mutated_json(CHUNK, draw).decode(errors="replace").replace("\n", " ")
    lines = [": comment", f"data: {chunk}", f"data: {json.dumps(CHUNK)}", "data: [DONE]"]
    base = "http://h:80"

    def whole() -> None:
        found = list(events(iter(lines[1:2] + lines[3:]), base))
        _completion(0.0, [1.0], 2.0, found[-1], 4)  # type: ignore[arg-type]

    reads: list[Callable[[], Any]] = [
        lambda: list(events(iter(lines), base)),
        whole,
        lambda: error_message(chunk.encode()),
    ]
    for read in reads:
        reads_or_refuses(read)
