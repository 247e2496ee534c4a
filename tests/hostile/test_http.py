"""Hostile and unlucky clients of the HTTP API: none of them stops another client's answer.

The server is real, with the guard's connections and reader processes; the engine is scripted.
"""

from __future__ import annotations

import contextlib
import json
import socket
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from k2cli.guard import http_connection
from k2cli.guard.http_connection import ConnectionLimits, LimitedConnection
from k2cli.models.text.tokenizer import Tokenizer
from k2cli.protocol import Generate, Tokens
from k2cli.server import auth, reader_queues
from k2cli.server.killable_reader import KillableReader
from k2cli.server.reader_messages import ReaderSettings
from k2cli.server.reader_queues import ProcessReader
from k2cli.server.served_model import ServedModel
from tests.server.scripted import ScriptedEngine, finished, serving

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
QUESTION = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4}
MIB = 2**20
CONTEXT = 4096
# A silence of the guard's event loop of 8 s would end the run.
WAIT_SECONDS = 120.0


class Server:
    """A running server and its engine."""

    def __init__(self, url: str, engine: ScriptedEngine) -> None:
        self.url = url
        self.engine = engine
        host, port = url.removeprefix("http://").split(":")
        self.address = (host, int(port))

    def post(self, body: Any, path: str = CHAT, **headers: str) -> httpx.Response:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        headers = {"content-type": "application/json", **headers}
        return httpx.post(
            f"{self.url}{path}", content=content, headers=headers, timeout=WAIT_SECONDS
        )

    def answers(self) -> None:
        """Assert that an ordinary request gets its answer."""
        self.engine.enqueue([Tokens("", [5]), finished(1)])
        response = self.post(QUESTION)
        assert response.status_code == 200, response.text
        assert response.json()["usage"]["completion_tokens"] == 1

    def send(self, data: bytes, *, half_close: bool = False) -> bytes:
        """Send bytes and read until the server closes the connection."""
        with socket.create_connection(self.address, timeout=WAIT_SECONDS) as connection:
            connection.sendall(data)
            if half_close:
                connection.shutdown(socket.SHUT_WR)
            answer = b""
            with contextlib.suppress(ConnectionResetError):
                while part := connection.recv(2**16):
                    answer += part
            return answer


@contextlib.contextmanager
def running(folder: Path, total: int = 64, **changes: Any) -> Iterator[Server]:
    served = ServedModel("toy", CONTEXT, **changes)
    settings = ReaderSettings(str(folder), "toy", CONTEXT, 1.0, 1.0, 0)
    first = KillableReader(settings, ("--k2-run", "hostile"))
    reader = ProcessReader(first, first.another())
    engine = ScriptedEngine()
    http = partial(LimitedConnection, ConnectionLimits(total, total))
    with serving(engine, served, Tokenizer.load(folder), reader, http=http) as url:
        yield Server(url, engine)


@pytest.fixture(scope="module")
def server(toy_k2: Path) -> Iterator[Server]:
    with running(toy_k2) as server:
        yield server


@pytest.mark.parametrize(
    ("path", "body"),
    [
        pytest.param(CHAT, b'{"messages":[' + b"0," * (2 * MIB) + b"0]}", id="zeros"),
        pytest.param(CHAT, b'{"messages":[' + b"0," * (15 * MIB) + b"0]}", id="more zeros"),
        pytest.param(
            CHAT,
            b'{"messages":[' + b'{"role":"user","content":""},' * 1_000_000 + b"0]}",
            id="a million empty messages",
        ),
        pytest.param(COMPLETIONS, b'{"prompt":"' + b"a" * (31 * MIB) + b'"}', id="long prompt"),
        pytest.param(
            CHAT,
            b'{"messages":[{"role":"user","content":"' + b"some plain words. " * 450_000 + b'"}]}',
            id="prose",
        ),
        pytest.param(CHAT, b"[" * MIB, id="brackets"),
        pytest.param(CHAT, b'{"messages":' + b"[" * 200_000 + b"]" * 200_000 + b"}", id="nested"),
        pytest.param(COMPLETIONS, b'{"prompt":[' + b"1," * MIB + b"1]}", id="token ids"),
        pytest.param(CHAT, b'{"model":"' + b"m" * (30 * MIB) + b'"}', id="name"),
    ],
)
def test_a_large_body_is_refused_and_nobody_else_notices(
    server: Server, path: str, body: bytes
) -> None:
    health: list[int] = []
    done = threading.Event()

    def watch() -> None:
        while not done.is_set():
            health.append(httpx.get(f"{server.url}/health", timeout=4).status_code)

    watching = threading.Thread(target=watch)
    watching.start()
    try:
        response = server.post(body, path)
    finally:
        done.set()
        watching.join()
    assert 400 <= response.status_code < 500, response.text[:300]
    assert len(response.content) < 5000
    assert set(health) == {200}
    server.answers()


def test_four_large_prompts_at_once_let_short_ones_pass(server: Server) -> None:
    body = b'{"messages":[{"role":"user","content":"' + b"plain words " * 250_000 + b'"}]}'
    statuses: list[int] = []
    threads = [
        threading.Thread(target=lambda: statuses.append(server.post(body).status_code))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    server.answers()
    for thread in threads:
        thread.join()
    assert statuses == [400] * 4


HOSTS = [
    ("localhost", 200),
    ("LOCALHOST:8080", 200),
    ("127.0.0.1:8080", 200),
    ("[::1]:8080", 200),
    ("mac.local", 200),
    ("evil.example", 403),
    ("evil.example:8080", 403),
    ("127.0.0.1.evil.example", 403),
    ("192.168.1.5", 403),
    ("", 403),
    ("[::1", 403),
]
ORIGINS = [
    ({}, 200),
    ({"origin": "http://localhost:8080", "host": "localhost:8080"}, 200),
    ({"origin": "http://evil.example"}, 403),
    ({"origin": "null"}, 403),
    ({"origin": "http://["}, 403),
    ({"origin": "http://localhost:3000", "host": "localhost:8080"}, 403),
    ({"sec-fetch-site": "cross-site"}, 403),
    ({"sec-fetch-site": "same-origin"}, 200),
    ({"content-type": "text/plain"}, 415),
    ({"content-type": "application/x-www-form-urlencoded"}, 415),
    ({"content-type": "application/json; charset=utf-8"}, 200),
]


def test_a_web_page_cannot_use_a_server_without_a_key(toy_k2: Path) -> None:
    with running(toy_k2, allowed_hosts=frozenset({"mac.local"})) as server:
        for host, status in HOSTS:
            response = httpx.get(f"{server.url}/v1/models", headers={"host": host})
            assert response.status_code == status, (host, response.text)
        for headers, status in ORIGINS:
            server.engine.enqueue([Tokens("", [5]), finished(1)])
            response = server.post(QUESTION, **headers)
            assert response.status_code == status, (headers, response.text)
        preflight = {"origin": "http://evil.example", "access-control-request-method": "POST"}
        refused = httpx.options(f"{server.url}{CHAT}", headers=preflight)
        assert "access-control-allow-origin" not in refused.headers
        assert httpx.get(f"{server.url}/health", headers={"host": "probe"}).status_code == 200


def test_an_allowed_origin_gets_its_preflight_and_its_answer(toy_k2: Path) -> None:
    origin = "https://chat.example"
    with running(toy_k2, cors_origins=frozenset({origin})) as server:
        headers = {
            "origin": origin,
            "access-control-request-method": "POST",
            "access-control-request-headers": "authorization,content-type",
        }
        preflight = httpx.options(f"{server.url}{CHAT}", headers=headers)
        assert preflight.status_code == 200
        assert preflight.headers["access-control-allow-origin"] == origin
        server.engine.enqueue([Tokens("", [5]), finished(1)])
        response = server.post(QUESTION, origin=origin, **{"sec-fetch-site": "cross-site"})
        assert response.status_code == 200
        assert response.headers["access-control-allow-origin"] == origin


def test_idle_and_half_sent_connections_end_and_leave_room(
    toy_k2: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_connection, "HEADER_SECONDS", 1.0)
    monkeypatch.setattr(http_connection, "BODY_SECONDS", 1.0)
    beginnings = [
        b"",
        b"G",
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n",
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n{",
    ]
    with running(toy_k2, total=16) as server, contextlib.ExitStack() as stack:
        connections = []
        for index in range(40):
            connection = stack.enter_context(
                socket.create_connection(server.address, timeout=WAIT_SECONDS)
            )
            with contextlib.suppress(OSError):
                connection.sendall(beginnings[index % len(beginnings)])
            connections.append(connection)
        server.answers()  # those without a request make room
        for connection in connections:  # each of them ends, answered or not
            with contextlib.suppress(ConnectionResetError):
                while connection.recv(2**16):
                    pass
        server.answers()


REQUEST = (
    b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
)


def test_a_client_that_closes_its_sending_side_gets_its_answer(server: Server) -> None:
    body = json.dumps(QUESTION).encode()
    server.engine.enqueue([0.5, Tokens("", [5]), finished(1)])
    head = REQUEST + f"Content-Length: {len(body)}\r\n\r\n".encode()
    answer = server.send(head + body, half_close=True)
    assert b"HTTP/1.1 200 OK" in answer
    assert b'"finish_reason"' in answer


@pytest.mark.parametrize(
    "rest",
    [
        b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n",
        b"Content-Length: 2\r\nContent-Length: 3\r\n\r\n{}",
        b"Content-Length: -1\r\n\r\n{}",
        b"Content-Length: 99999999999999999999\r\n\r\n{}",
        b"Content-Length: " + b"9" * 5000 + b"\r\n\r\n{}",
        b"Transfer-Encoding: gzip, chunked\r\n\r\n",
        b"X: " + b"x" * 100_000 + b"\r\n\r\n",
    ],
)
def test_contradicting_and_impossible_framing_is_refused(server: Server, rest: bytes) -> None:
    answer = server.send(REQUEST + b"Connection: close\r\n" + rest)
    status = int(answer.split(b" ")[1]) if answer else 400  # or the connection is just closed
    assert 400 <= status < 600
    assert status != 500
    server.answers()


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"temperature": 1e-39}, {"temperature": 0.0}),
        ({"temperature": 1e-7, "top_p": 1e-46}, {"temperature": 0.0, "top_p": 1e-6}),
        ({"temperature": 0.7, "top_p": 0.9}, {"temperature": 0.7, "top_p": 0.9}),
        ({"repetition_penalty": 1e-38, "logprobs": True}, None),
        ({"logit_bias": {str(token): 1 for token in range(20_000)}}, None),
    ],
)
def test_values_that_float32_cannot_use_never_reach_the_engine(
    server: Server, changes: dict[str, Any], expected: dict[str, float] | None
) -> None:
    before = len(server.engine.submitted)
    if expected is not None:
        server.engine.enqueue([Tokens("", [5]), finished(1)])
    response = server.post({**QUESTION, **changes})
    assert response.status_code == (400 if expected is None else 200), response.text
    if expected is None:
        assert len(server.engine.submitted) == before
        return
    asked: Generate = server.engine.submitted[-1]
    assert {name: getattr(asked.sampling, name) for name in expected} == expected


def without_template(source: Path, folder: Path) -> Path:
    """Make a checkpoint without weights and chat template."""
    folder.mkdir()
    for path in source.iterdir():
        if path.suffix != ".safetensors" and path.name != "chat_template.jinja":
            (folder / path.name).symlink_to(path)
    return folder


def test_a_template_that_never_ends_fails_its_request_alone(
    toy_k2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reader_queues, "SHORT_SECONDS", 3.0)
    folder = without_template(toy_k2, tmp_path / "looping")
    template = folder / "chat_template.jinja"
    loop = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    template.write_text(
        "{% if messages[0].content == 'loop' %}" + loop + "{% endif %}{{ messages[0].content }}"
    )
    with running(folder) as server:
        server.answers()
        looping = {"messages": [{"role": "user", "content": "loop"}]}
        response = server.post(looping)
        assert response.status_code == 400
        assert "took longer than 3 s" in response.text
        server.answers()


def test_a_template_that_makes_an_endless_text_fails_its_request_alone(
    toy_k2: Path, tmp_path: Path
) -> None:
    folder = without_template(toy_k2, tmp_path / "huge")
    (folder / "chat_template.jinja").write_text(
        "{{ messages[0].content * (10 ** 11 if messages[0].content == 'huge' else 1) }}"
    )
    with running(folder) as server:
        server.answers()
        response = server.post({"messages": [{"role": "user", "content": "huge"}]})
        assert response.status_code == 400
        server.answers()


def test_a_request_survives_the_end_of_its_reader(toy_k2: Path) -> None:
    with running(toy_k2) as server:
        server.answers()
        for _ in range(2):
            for process in psutil.Process().children(recursive=True):
                if "k2cli.guard.reader_process" in process.cmdline():
                    process.kill()
            server.answers()


def test_the_bytes_of_all_bodies_together_are_limited(
    toy_k2: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(auth, "BODIES_HELD", 2)
    with running(toy_k2, max_body_bytes=100_000) as server, contextlib.ExitStack() as stack:
        head = REQUEST + b"Content-Length: 90000\r\n\r\n"
        connections = []
        for _ in range(4):  # three do not fit together; none is complete
            connection = stack.enter_context(
                socket.create_connection(server.address, timeout=WAIT_SECONDS)
            )
            connection.sendall(head + b" " * 89_000)
            connections.append(connection)
        answers = [connection.recv(100) for connection in connections[2:]]
        assert all(b" 503 " in answer for answer in answers)
        stack.close()
        server.answers()


def test_connections_of_one_address_make_room_among_themselves() -> None:
    class Idle:
        def __init__(self, address: str) -> None:
            self.address, self.closed, self.transport = address, False, self

        def abort(self) -> None:
            self.closed = True

    limits = ConnectionLimits(total=6, per_address=3)
    idle = [Idle("10.0.0.2"), *(Idle("10.0.0.1") for _ in range(3))]
    for each in idle:
        limits.addresses[each.address] += 1
        limits.idle[each] = None  # type: ignore[index]
    assert limits.make_room("10.0.0.1")
    assert [each.closed for each in idle] == [False, True, False, False]
    limits.idle.clear()  # all have requests in progress
    assert not limits.make_room("10.0.0.1")
    assert limits.make_room("10.0.0.2")
    assert limits.make_room("127.0.0.1")
