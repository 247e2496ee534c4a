"""Hostile HTTP clients over raw sockets, drawn by seed: framing, floods, slowness, and bodies.

An ``Attack`` is what one client does with one connection, and what may come back. Nearly half of
them are requests that a rank computes, sent in unusual ways. The same attacks go to a scripted
engine (``test_generated_http.py``) and to two real ranks (``scripts/soak hostile``).
"""

from __future__ import annotations

import contextlib
import itertools
import json
import re
import socket
import struct
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from random import Random
from typing import Any, Literal

from tests.hostile.mutation import as_json, damaged, mutated

HOST = b"Host: localhost\r\n"
PATHS = ("/v1/completions", "/v1/chat/completions", "/v1/tokenize")
PROMPTS = ([301, 302, 303], [310, *range(400, 420)], [350, 351])
"""Prompts whose greedy answers are known; see ``fixed``."""

LIMIT_SECONDS = 100.0
"""An answer or a close comes within 15 s for a header and 60 s for a body, on a quiet machine."""

_PATIENCE_SECONDS = 0.3
Ending = Literal["read", "half-close", "leave", "reset"]


@dataclass(frozen=True, slots=True)
class Attack:
    """What a client sends and how it behaves, and what is right.

    Attributes:
        kind: for the table.
        pieces: sent one after the other.
        pause_seconds: between two pieces.
        ending: ``read`` until the server closes; the same after a ``half-close``; or ``leave``
            (``reset``: with a reset) after ``leave_after_bytes`` of the answer, or after a moment.
        read_pause_seconds: between two reads of a small receive buffer; 0 reads as fast as it can.
        answers: how many answers of status 200 there must be; None if that is open.
        refused: no answer may have the status 200.
        prompt: the index of the prompt in ``PROMPTS`` whose greedy answer must come each time.
    """

    kind: str
    pieces: tuple[bytes, ...]
    pause_seconds: float = 0.0
    ending: Ending = "read"
    leave_after_bytes: int = 0
    read_pause_seconds: float = 0.0
    answers: int | None = None
    refused: bool = False
    prompt: int | None = None
    reaches_a_rank: bool = False


# --- requests -------------------------------------------------------------------------------------


def fixed(prompt: int, **changes: Any) -> dict[str, Any]:
    """Return the body of a greedy request whose answer is known."""
    return {
        "prompt": PROMPTS[prompt],
        "max_tokens": 4,
        "temperature": 0,
        "k2": {"cache": False, "ignore_stop_tokens": True},
    } | changes


def request(
    body: bytes, path: str = PATHS[0], headers: bytes = b"", *, keep: bool = False, length: str = ""
) -> bytes:
    """Return a whole request with a JSON body; ``keep`` the connection open after it."""
    return (
        b"POST " + path.encode() + b" HTTP/1.1\r\n" + HOST + b"Content-Type: application/json\r\n"
        + (b"" if keep else b"Connection: close\r\n") + headers
        + f"Content-Length: {length or len(body)}\r\n\r\n".encode() + body
    )  # fmt: skip


def chunked(body: bytes, draw: Random, *, ends: bytes = b"0\r\n\r\n") -> bytes:
    """Return a request whose body comes in chunks of random sizes."""
    text = b""
    while body:
        size = draw.choice((1, 3, 17, len(body)))
        part, body = body[:size], body[size:]
        extension = draw.choice((b"", b"", b";a=b", b';name="value"'))
        text += f"{len(part):x}".encode() + extension + b"\r\n" + part + b"\r\n"
    head = b"POST /v1/completions HTTP/1.1\r\n" + HOST + b"Content-Type: application/json\r\n"
    return head + b"Connection: close\r\nTransfer-Encoding: chunked\r\n\r\n" + text + ends


def _good(draw: Random) -> tuple[int, bytes]:
    prompt = draw.randrange(len(PROMPTS))
    return prompt, as_json(fixed(prompt))


def _pieces(data: bytes, draw: Random, most: int) -> tuple[bytes, ...]:
    cuts = sorted(
        {0, len(data), *(draw.randrange(len(data)) for _ in range(draw.randint(1, most)))}
    )
    return tuple(data[a:b] for a, b in itertools.pairwise(cuts))


# --- kinds that reach a rank ----------------------------------------------------------------------


def _plain(draw: Random) -> Attack:
    """A greedy request, as it should be."""
    prompt, body = _good(draw)
    flood = b"".join(b"X-%d: %s\r\n" % (n, b"x" * draw.randrange(40)) for n in range(90))
    headers = draw.choice((b"", b"", flood, b"Expect: 100-continue\r\n", b"Accept: */*\r\n"))
    data = request(body, headers=headers)
    return Attack("", (data,), answers=1, prompt=prompt)


def _slow_sender(draw: Random) -> Attack:
    """The same in up to ten pieces with pauses."""
    prompt, body = _good(draw)
    pieces = _pieces(request(body), draw, 9)
    return Attack("", pieces, pause_seconds=draw.choice((0.0, 0.01, 0.2)), answers=1, prompt=prompt)


def _pipelined(draw: Random) -> Attack:
    """Two to four at once on one connection."""
    prompt, body = _good(draw)
    count = draw.randint(2, 4)
    data = request(body, keep=True) * (count - 1) + request(body)
    return Attack("", _pieces(data, draw, 2), answers=count, prompt=prompt)


def _half_close(draw: Random) -> Attack:
    """The client closes its sending side after the request."""
    prompt, body = _good(draw)
    return Attack("", (request(body),), ending="half-close", answers=1, prompt=prompt)


def _chunked(draw: Random) -> Attack:
    """Chunks of one byte and more, with extensions and trailers."""
    prompt, body = _good(draw)
    ends = draw.choice((b"0\r\n\r\n", b"0\r\nX-Trailer: 1\r\n\r\n", b"000\r\n\r\n"))
    return Attack("", (chunked(body, draw, ends=ends),), answers=1, prompt=prompt)


def _slow_reader(draw: Random) -> Attack:
    """A stream that its client reads in small pieces, with pauses."""
    prompt = draw.randrange(len(PROMPTS))
    data = request(as_json(fixed(prompt, stream=True)))
    pause = draw.choice((0.01, 0.05))
    return Attack("", (data,), read_pause_seconds=pause, answers=1, prompt=prompt)


def _walks_away(draw: Random) -> Attack:
    """A stream that its client leaves in the middle, half of them with a reset."""
    prompt = draw.randrange(len(PROMPTS))
    data = request(as_json(fixed(prompt, stream=True, max_tokens=300)))
    ending = draw.choice(("leave", "reset"))
    return Attack("", (data,), ending=ending, leave_after_bytes=draw.choice((0, 1, 400, 900)))


def _odd_values(draw: Random) -> Attack:
    """Values at the edges of what is allowed."""
    body: dict[str, Any] = {"max_tokens": draw.randint(1, 6), "k2": {"ignore_stop_tokens": True}}
    odd = {
        "temperature": (0, 1e-39, 1e-7, 0.7, 2), "top_p": (1e-46, 0.1, 1), "top_k": (-1, 0, 1,
        2**31 - 1),
        "min_p": (0, 1e-40, 1), "seed": (0, -(2**63), 2**63 - 1), "repetition_penalty": (0.001, 1,
        10),
        "presence_penalty": (-2, 2), "frequency_penalty": (-2, 1e-40, 2), "stream": (True, False,
        None),
        "logit_bias": ({"5": -100}, {"5": 100, "6": 1e-45}, {}), "stop": ("a", ["\u00e9", "b"],
        None),
        "user": ("\u202e" * 50, None), "metadata": ({"a": [1, {}]},),
    }  # fmt: skip
    for name in draw.sample(sorted(odd), draw.randint(1, 6)):
        body[name] = draw.choice(odd[name])
    if draw.random() < 0.5:
        path = PATHS[1]
        text = draw.choice(
            ("Hello", "\u00e9\u4e2d\U0001f600", "\\u0000", " ", "<|im_end|>", "a" * 300)
        )
        body["messages"] = [{"role": "user", "content": text}]
        body |= draw.choice(({}, {"logprobs": True, "top_logprobs": 20}))
    else:
        path = PATHS[0]
        body["prompt"] = draw.choice((PROMPTS[0], "Hello", "\u00e9\u4e2d\U0001f600", [0] * 40))
        body |= draw.choice(({}, {"logprobs": 5}))
    return Attack("", (request(as_json(body), path),), answers=1)


# --- kinds that are refused, or broken off --------------------------------------------------------


def _changed_body(draw: Random) -> Attack:
    """A valid body with one to four changes at random places, perhaps damaged as bytes."""
    body: dict[str, Any] = fixed(0) | {"stop": ["a"], "logit_bias": {"5": 1.5}, "seed": 1}
    path = draw.choice(PATHS)
    if path != PATHS[0]:
        del body["prompt"]
        body["messages"] = [
            {"role": "system", "content": "short"},
            {"role": "user", "content": [{"type": "text", "text": "Hello"}]},
        ]
    if path == PATHS[2]:
        body = {"messages": body["messages"], "tools": [{"type": "function", "function": {}}]}
    changed = mutated(body, draw)
    if path != PATHS[2] and isinstance(changed, dict):
        changed["max_tokens"] = draw.choice((4, 4, 4, -1, 1.5, "4"))
    data = as_json(changed)
    data = damaged(data, draw) if draw.random() < 0.2 else data
    return Attack("", (request(data, path),))


_FRAMING = (
    b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n",
    b"Transfer-Encoding: chunked\r\nContent-Length: 2\r\n\r\n0\r\n\r\n",
    b"Content-Length: 2\r\nContent-Length: 3\r\n\r\n{}", b"Content-Length: 2, 3\r\n\r\n{}",
    b"Content-Length: -1\r\n\r\n{}", b"Content-Length: +2\r\n\r\n{}",
    b"Content-Length: 0x2\r\n\r\n{}",
    b"Content-Length: 99999999999999999999\r\n\r\n{}",
    b"Content-Length: 99999999999999999\r\n\r\n{}",
    b"Content-Length: " + b"9" * 5000 + b"\r\n\r\n{}", b"Content-Length:\r\n\r\n{}",
    b"Content-Length: 2\r\n\r\n", b"Content-Length : 2\r\n\r\n{}", b" Content-Length: 2\r\n\r\n{}",
    b"Content-Length: 2\r\n folded\r\n\r\n{}", b"Content-Length: \xb2\r\n\r\n{}",
    b"Transfer-Encoding: gzip, chunked\r\n\r\n",
    b"Transfer-Encoding: chunked, chunked\r\n\r\n0\r\n\r\n",
    b"Transfer-Encoding: identity\r\n\r\n{}", b"Transfer-Encoding: \x0bchunked\r\n\r\n0\r\n\r\n",
    b"Transfer-Encoding: chunked\r\n\r\nffffffffffffffff\r\n{}",
    b"Transfer-Encoding: chunked\r\n\r\n10000000000000000\r\n{}",
    b"Transfer-Encoding: chunked\r\n\r\n-1\r\n{}", b"Transfer-Encoding: chunked\r\n\r\nxyz\r\n{}",
    b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}}}\r\n0\r\n\r\n",
    b"Transfer-Encoding: chunked\r\n\r\n2;" + b"a" * 70_000 + b"\r\n{}\r\n0\r\n\r\n",
    b"Transfer-Encoding: chunked\r\n\r\n0\r\n" + b"A: b\r\n" * 9000 + b"\r\n",
    b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}", b"A\0b: c\r\n\r\n", b"A: \0\r\n\r\n",
    b": x\r\n\r\n",
    b"A: b\rc\r\n\r\n", b"A\r\n\r\n", b"Host: localhost\r\n\r\n", b"Upgrade: websocket\r\n\r\n",
)  # fmt: skip
# The same around a valid body: BODY, its LENGTH, and its length in HEX.
_AMBIGUOUS = (
    b"Content-Length: LENGTH\r\nTransfer-Encoding: chunked\r\n\r\nHEX\r\nBODY\r\n0\r\n\r\n",
    b"Transfer-Encoding: chunked\r\nContent-Length: LENGTH\r\n\r\nBODY",
    b"Content-Length: LENGTH\r\nContent-Length: 3\r\n\r\nBODY",
    b"Content-Length : LENGTH\r\n\r\nBODY",
    b"Content-Length: LENGTH\r\nHost: localhost\r\n\r\nBODY",
    b"Content-Length: +LENGTH\r\n\r\nBODY",
    b"Content-Length: LENGTH\r\nA: \0\r\n\r\nBODY",
    b"Transfer-Encoding: xchunked\r\n\r\nHEX\r\nBODY\r\n0\r\n\r\n",
    b"Transfer-Encoding: chunked\r\n\r\n0xHEX\r\nBODY\r\n0\r\n\r\n",
    b"Transfer-Encoding: chunked\r\n\r\nHEX\r\nBODYx\r\n0\r\n\r\n",
)  # fmt: skip


def _framing(draw: Random) -> Attack:
    """Lengths that contradict each other or are impossible; broken headers and chunks."""
    head = b"POST /v1/completions HTTP/1.1\r\n" + HOST + b"Content-Type: application/json\r\n"
    body = as_json(fixed(0))
    rest = draw.choice((*_FRAMING, *_AMBIGUOUS)).replace(b"LENGTH", b"%d" % len(body))
    rest = rest.replace(b"HEX", b"%x" % len(body)).replace(b"BODY", body)
    ending: Ending = draw.choice(("half-close", "half-close", "leave", "reset"))
    if draw.random() < 0.02:
        ending = "read"  # until the server's own time limit
    return Attack("", (head + rest,), ending=ending, refused=True)


_LINES = (
    b"", b"\r\n\r\n\r\n", b"GET", b"GET / HTTP/0.9\r\n\r\n", b"GET /health\r\n\r\n",
    b"\x16\x03\x01\x02\0\x01\0",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"GET /health HTTP/1.1\n\n",
    b"GET  /health HTTP/1.1\r\n\r\n",
    b"GET /health HTTP/9.9\r\n\r\n", b"G\xffT /health HTTP/1.1\r\n\r\n",
    b"GET /\xff HTTP/1.1\r\n\r\n",
    b"GET http://[::1 HTTP/1.1\r\n" + HOST + b"\r\n", b"GET * HTTP/1.1\r\n" + HOST + b"\r\n",
    b"CONNECT evil.example:443 HTTP/1.1\r\n" + HOST + b"\r\n",
    b"OPTIONS * HTTP/1.1\r\n" + HOST + b"\r\n",
    b"TRACE / HTTP/1.1\r\n" + HOST + b"\r\n", b"SSH-2.0-x\r\n", b"\0" * 500, b"\xff" * 70_000,
    b"GET /" + b"a" * 90_000 + b" HTTP/1.1\r\n" + HOST + b"\r\n", b"x" * 200_000,
)  # fmt: skip


def _garbage(draw: Random) -> Attack:
    """What is not HTTP/1.1, and damaged requests."""
    data = draw.choice(_LINES)
    if draw.random() < 0.5:
        data = damaged(request(as_json(fixed(0))), draw)
    ending: Ending = draw.choice(("half-close", "half-close", "leave", "reset"))
    return Attack("", (data,), ending=ending)


def _headers(draw: Random) -> Attack:
    """Floods of headers, and odd values of those that the server reads."""
    if draw.random() < 0.4:
        flood = draw.choice(
            (b"A: b\r\n" * 9000, b"A: " + b"b" * 100_000 + b"\r\n", b"A: b\r\n" * 900)
        )
        rest = draw.choice((b"\r\n", b""))
        data = b"GET /health HTTP/1.1\r\n" + HOST + b"Connection: close\r\n" + flood + rest
        return Attack("", _pieces(data, draw, 3), ending="half-close")
    odd = draw.choice((
        b"Origin: http://[\r\n", b"Origin: http://[::1\r\n", b"Origin: \xff\r\n",
        b"Origin: null\r\n",
        b"Origin: http://localhost\r\nOrigin: http://evil.example\r\n",
        b"Origin: http://a@b:99999999\r\n",
        b"Authorization: Bearer \xff\xfe\r\n", b"Authorization: " + b"B" * 9000 + b"\r\n",
        b"Sec-Fetch-Site: cross-site\r\n", b"Host: [::1\r\n", b"Host: 999.1.1.1\r\n",
        b"Host: \xff\r\n",
        b"Content-Type: application/json; charset=utf-16\r\n", b"Content-Encoding: gzip\r\n",
        b"Connection: upgrade\r\nUpgrade: websocket\r\n", b"Connection: \xff, close\r\n",
        b"X-Forwarded-For: \xff\r\nX-Forwarded-Proto: x\r\n",
        b"Accept-Encoding: " + b"*," * 900 + b"\r\n",
        b"Expect: 200-ok\r\n", b"TE: trailers\r\nTrailer: Content-Length\r\n", b"Cookie: \x80\r\n",
    ))  # fmt: skip
    return Attack("", (request(as_json(fixed(0)), headers=odd),))


def _routes(draw: Random) -> Attack:
    """Other methods, routes and names."""
    method = draw.choice(
        ("GET", "HEAD", "PUT", "DELETE", "PATCH", "OPTIONS", "POST", "get", "X" * 300)
    )
    path = draw.choice((
        "/", "/health", "/v1", "/v1/models", "/v1/models/", "/v1/models/%00", "/v1/models/%ff%fe",
        "/v1/models/../../etc/passwd", "/v1/models/" + "%2e" * 900, "/v1/completions/",
        "//v1/models",
        "/v1/models?a=%zz&%ff", "/%", "/v1/models/%ED%A0%80", "/v1/models/%0d%0aX:%20y",
        "/?" + "a" * 9000,
        "http://localhost/health", "http://[", "/v1/tokenize", "/health#a", "/health;a=b", "*",
    ))  # fmt: skip
    head = f"{method} {path} HTTP/1.1\r\n".encode() + HOST + b"Connection: close\r\n\r\n"
    return Attack("", (head,))


def _cut_short(draw: Random) -> Attack:
    """A request whose rest never comes."""
    data = request(as_json(fixed(0)))
    data = data[: draw.randrange(len(data))]
    ending: Ending = draw.choice(("half-close", "leave", "reset"))
    if draw.random() < 0.05:
        ending = "read"
    return Attack("", (data,), ending=ending, refused=True)


def _after_one(draw: Random) -> Attack:
    """Garbage, or half a request, pipelined after a good one."""
    prompt, body = _good(draw)
    rest = draw.choice(
        (*_LINES[:16], request(body)[:50], b"POST /v1/completions HTTP/1.1\r\n" + _FRAMING[0])
    )
    return Attack("", (request(body, keep=True) + rest,), ending="half-close", prompt=prompt)


def _unread(draw: Random) -> Attack:
    """Many requests at once whose answers are never read."""
    data = b"GET /v1/models HTTP/1.1\r\n" + HOST + b"\r\n"
    return Attack("", (data * draw.choice((50, 500)),), ending=draw.choice(("leave", "reset")))


def _huge(draw: Random) -> Attack:
    """A body of 1 to 33 MiB."""
    size = draw.choice((1, 2, 8, 31, 33)) * 2**20
    body = draw.choice((
        b'{"messages":[' + b"0," * (size // 2) + b"0]}", b'{"prompt":"' + b"a" * size + b'"}',
        b'{"prompt":[' + b"1," * (size // 2) + b"1]}", b"[" * size, b" " * size,
        b'{"prompt":[1],"model":"' + b"m" * size + b'"}',
        b'{"prompt":[1],"' + b"k" * size + b'":1}',
    ))  # fmt: skip
    length = draw.choice(("", "", str(10**10)))
    ending: Ending = "half-close" if length else draw.choice(("read", "read", "leave", "reset"))
    return Attack("", (request(body, length=length),), ending=ending, refused=True)


Make = Callable[[Random], Attack]
# Name, share of a thousand, makes one, reaches a rank.
KINDS: tuple[tuple[str, int, Make, bool], ...] = (
    ("plain", 130, _plain, True),
    ("slow sender", 40, _slow_sender, True),
    ("pipelined", 50, _pipelined, True),
    ("half-close", 40, _half_close, True),
    ("chunked", 50, _chunked, True),
    ("slow reader", 30, _slow_reader, True),
    ("walks away", 40, _walks_away, True),
    ("odd values", 70, _odd_values, True),
    ("changed body", 180, _changed_body, False),
    ("framing", 110, _framing, False),
    ("garbage", 80, _garbage, False),
    ("headers", 70, _headers, False),
    ("routes", 50, _routes, False),
    ("cut short", 30, _cut_short, False),
    ("garbage after a good one", 20, _after_one, True),
    ("answers never read", 8, _unread, False),
    ("huge body", 2, _huge, False),
)


def make_attack(seed: int, number: int) -> Attack:
    """Make the attack with this number: the same one each time."""
    draw = Random(f"{seed}-{number}")
    name, _, make, reaches = draw.choices(KINDS, weights=[share for _, share, *_ in KINDS])[0]
    return replace(make(draw), kind=name, reaches_a_rank=reaches)


# --- carrying them out ----------------------------------------------------------------------------


@dataclass(slots=True)
class Answered:
    """What came back, and the time that it took."""

    data: bytes = b""
    seconds: float = 0.0
    in_time: bool = True
    statuses: list[int] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)


def carry_out(attack: Attack, address: tuple[str, int]) -> Answered:
    """Do what the client does, and return what it got until the connection closed."""
    answered = Answered()
    started = time.monotonic()
    until = started + LIMIT_SECONDS
    with socket.socket() as connection, contextlib.suppress(ConnectionError):
        if attack.read_pause_seconds:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        connection.settimeout(LIMIT_SECONDS)
        try:
            connection.connect(address)
            with contextlib.suppress(ConnectionError):  # its answer may have come before
                for piece in attack.pieces:
                    connection.sendall(piece)
                    time.sleep(attack.pause_seconds)
                if attack.ending == "half-close":
                    with contextlib.suppress(OSError):  # the server may have closed it
                        connection.shutdown(socket.SHUT_WR)
            _read(attack, connection, answered, until)
        except TimeoutError:
            answered.in_time = attack.ending in ("leave", "reset")
        if attack.ending == "reset":
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    answered.seconds = time.monotonic() - started
    answered.statuses = [
        int(status) for status in re.findall(rb"HTTP/1\.1 ([2-5]\d\d) ", answered.data)
    ]
    answered.texts = _texts(answered.data)
    return answered


def _read(attack: Attack, connection: socket.socket, answered: Answered, until: float) -> None:
    leaves = attack.ending in ("leave", "reset")
    while not leaves or len(answered.data) <= attack.leave_after_bytes:
        patience = until - time.monotonic()
        if leaves and not attack.leave_after_bytes:
            patience = _PATIENCE_SECONDS
        connection.settimeout(max(patience, 0.001))
        part = connection.recv(200 if attack.read_pause_seconds else 2**16)
        if not part:
            return
        answered.data += part
        time.sleep(attack.read_pause_seconds)


def _texts(data: bytes) -> list[str]:
    """Return the texts of whole completions, and of streams that have ended."""
    texts = []
    decoder = json.JSONDecoder()
    text = data.decode(errors="replace")
    streamed = ""
    for found in re.finditer(r'(?:(data: )|(?<!data: ))(?=\{"id":"cmpl-)|data: \[DONE\]', text):
        if found[0] == "data: [DONE]":
            texts.append(streamed)
            streamed = ""
            continue
        try:
            document, _ = decoder.raw_decode(text, found.end())
        except ValueError:  # broken off
            continue
        said = "".join(choice.get("text", "") for choice in document["choices"])
        if found[1]:
            streamed += said
        else:
            texts.append(said)
    return texts


def complaint(attack: Attack, answered: Answered, quiet: Sequence[str]) -> str:
    """Describe what was wrong with an answer; empty if it was right."""
    statuses = answered.statuses
    if not answered.in_time:
        return f"neither an answer nor a close in {LIMIT_SECONDS:.0f} s; statuses {statuses}"
    if bad := [status for status in statuses if status in (500, 502, 504)]:
        return f"status {bad[0]}"
    if attack.answers is not None and statuses != [200] * attack.answers:
        return f"{attack.answers} answers of status 200 were due, and {statuses} came"
    if attack.refused and 200 in statuses:
        return "it was accepted"
    if attack.prompt is not None:
        if attack.answers is not None and len(answered.texts) != attack.answers:
            return f"{attack.answers} texts were due, and {len(answered.texts)} came"
        if other := [text for text in answered.texts if text != quiet[attack.prompt]]:
            return f"another text: {other[0]!r} instead of {quiet[attack.prompt]!r}"
    return ""


def good(prompt: int) -> Attack:
    """Return an ordinary request for a known answer."""
    return Attack("good", (request(as_json(fixed(prompt))),), answers=1, prompt=prompt)
