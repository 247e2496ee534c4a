"""TLS of the API: real clients, k2's own commands, renewal, and strangers who never shake hands."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import socket
import ssl
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import anthropic
import httpx
import httpx2
import openai
import pytest
import uvicorn

from k2cli.access.tls_files import ServerTls
from k2cli.guard import http_connection
from k2cli.guard.http_connection import ConnectionLimits, LimitedConnection, TlsConnection
from tests.support.certificates import Files, issue
from tests.support.commands import k2
from tests.support.harness import supervised, wait_until
from tests.support.scripted_answers import ANSWERS_VARIABLE, Rule, save_rules

HELLO = b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"


def _trust(files: Files) -> ssl.SSLContext:
    return ssl.create_default_context(cafile=files.authority)


def _shown(url: str) -> str:
    """Return the certificate that a server shows."""
    port = int(url.rpartition(":")[2])
    return ssl.get_server_certificate(("127.0.0.1", port), timeout=10).strip()


@pytest.mark.ranks
@pytest.mark.timeout(120)
def test_clients_and_commands_of_a_run_with_tls(toy_k2: Path, tmp_path: Path) -> None:
    files = issue(tmp_path / "tls", "studio.local", "127.0.0.1")
    save_rules(tmp_path / "answers.json", [Rule("Paris it is.")])
    environment = {ANSWERS_VARIABLE: str(tmp_path / "answers.json")}
    tls = {"tls_certificate": str(files.certificate), "tls_key": str(files.key)}
    with supervised(
        "local", 1, model=toy_k2, context_length=8192, environment=environment,
        http={"api_key": "k2-own", **tls},
    ) as run:  # fmt: skip
        url = run.wait_ready().url
        assert url.startswith("https://127.0.0.1:")
        (run.record.folder / "api-key").write_text("k2-own")
        question: Any = [{"role": "user", "content": "Capital of France?"}]
        with (
            openai.OpenAI(
                base_url=f"{url}/v1", api_key="k2-own", max_retries=0,
                http_client=httpx.Client(verify=_trust(files)),
            ) as client,
            anthropic.Anthropic(
                base_url=url, api_key="k2-own", max_retries=0,
                http_client=httpx2.Client(verify=_trust(files)),
            ) as other,
        ):  # fmt: skip
            parts = client.chat.completions.create(model="scripted", messages=question, stream=True)
            text = "".join(part.choices[0].delta.content or "" for part in parts if part.choices)
            assert "Paris it is." in text
            answer = other.messages.create(model="scripted", max_tokens=50, messages=question)
            assert "Paris it is." in getattr(answer.content[0], "text", "")
        with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
            httpx.get(f"{url}/health")
        with pytest.raises(httpx.TransportError):
            httpx.get(url.replace("https", "http") + "/health")

        # The certificate is for other names than the one in the run's URL, and is renewed.
        renewed = issue(tmp_path / "renewed", "elsewhere.example")
        renewed.certificate.replace(files.certificate)
        renewed.key.replace(files.key)
        own = files.own_certificate.strip()
        wait_until(lambda: _shown(url) == own, 20, "the renewed certificate")
        wait_until(lambda: "renewed TLS" in run.record.log_file.read_text(), 5, "a line")
        chat = k2("chat", "-p", "Capital of France?")
        assert chat.returncode == 0, chat.stderr
        assert "Paris it is." in chat.stdout
        assert json.loads(k2("ps", "--json").stdout)["status"][run.run_id]["state"] == "ready"
        # Commands of the run trust this one certificate, and no other.
        path = run.record.certificate_file
        assert path is not None
        path.write_text(issue(tmp_path / "foreign", "127.0.0.1").own_certificate)
        refused = k2("chat", "-p", "Capital of France?")
        assert refused.returncode == 5
        assert "is not accepted" in refused.stderr
    assert run.record.certificate_file is None


# --- connections ---------------------------------------------------------------------------------


async def _app(scope: Any, receive: Any, send: Any) -> None:
    if scope["type"] == "lifespan":
        return
    body = scope["scheme"].encode()
    await send({"type": "http.response.start", "status": 200, "headers": [(b"a", b"b")]})
    await send({"type": "http.response.body", "body": body})


@contextlib.asynccontextmanager
async def _server(files: Files, total: int = 20) -> AsyncIterator[tuple[int, ConnectionLimits]]:
    tls = ServerTls(str(files.certificate), str(files.key))
    limits = ConnectionLimits(total, total)

    def connection(**named: Any) -> asyncio.Protocol:
        make_http: Callable[[], asyncio.Protocol]
        make_http = functools.partial(LimitedConnection, limits, **named)
        return TlsConnection(lambda: tls.context, limits, make_http)

    listener = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(_app, http=connection, log_config=None, lifespan="off")  # type: ignore[arg-type]
    server = uvicorn.Server(config)
    serving = asyncio.create_task(server._serve(sockets=[listener]))
    while not server.started:
        await asyncio.sleep(0.01)
    try:
        yield listener.getsockname()[1], limits
    finally:
        server.should_exit = True
        await serving
        listener.close()


async def _get(port: int, files: Files) -> str:
    async with httpx.AsyncClient(verify=_trust(files)) as client:
        return (await client.get(f"https://127.0.0.1:{port}/")).text


async def test_a_request_that_comes_with_the_end_of_the_handshake(tmp_path: Path) -> None:
    files = issue(tmp_path, "127.0.0.1")
    async with _server(files) as (port, _):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        client = _trust(files).wrap_bio(incoming, outgoing, server_hostname="127.0.0.1")
        while True:
            try:
                client.do_handshake()
                break
            except ssl.SSLWantReadError:
                writer.write(outgoing.read())
                incoming.write(await reader.read(2**16))
        client.write(HELLO)
        writer.write(outgoing.read())  # the last of the handshake and the request, in one piece
        answer = b""
        while b"https" not in answer:
            incoming.write(await reader.read(2**16))
            with contextlib.suppress(ssl.SSLWantReadError):
                while True:
                    answer += client.read(2**16)
        writer.transport.abort()
    assert answer.startswith(b"HTTP/1.1 200")


async def test_strangers_without_a_handshake_make_room_and_are_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = issue(tmp_path, "127.0.0.1")
    async with _server(files, total=8) as (port, limits):
        strangers = [await asyncio.open_connection("127.0.0.1", port) for _ in range(30)]
        strangers[-1][1].write(HELLO)  # one that does not speak TLS
        assert await _get(port, files) == "https"
        assert limits.addresses.total() <= 8
        first = await asyncio.wait_for(strangers[0][0].read(), 10)
        assert first == b""  # it has made room
        monkeypatch.setattr(http_connection, "HANDSHAKE_SECONDS", 0.2)
        late = await asyncio.open_connection("127.0.0.1", port)
        assert await asyncio.wait_for(late[0].read(), 10) == b""
        for _, writer in (*strangers, late):
            writer.close()
        for _ in range(500):
            if not limits.addresses.total():
                break
            await asyncio.sleep(0.01)
        assert limits.addresses.total() == 0
        assert not limits.idle
