"""Proxies that the environment names, for chat, bench and the Hub."""

from __future__ import annotations

import os
import socket
import threading
from pathlib import Path

import httpx2
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from k2cli.client.client import ApiClient
from k2cli.errors import K2Error
from k2cli.models.sources.hub import repository_files
from k2cli.proxies import proxy_for, unusable_proxy

NAMES = ("ALL_PROXY", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "https_proxy")


@pytest.fixture(autouse=True)
def _no_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)


@pytest.mark.parametrize(
    ("name", "value", "hint"),
    [
        # LlamaFactory#8928, pdm#3390: desktop programs set socks://.
        ("ALL_PROXY", "socks://127.0.0.1:7891/", "export ALL_PROXY=socks5://127.0.0.1:7891/"),
        ("all_proxy", "socks4://127.0.0.1:1", "export all_proxy=socks5://127.0.0.1:1"),
        ("HTTPS_PROXY", "http://127.0.0.1:port", "export HTTPS_PROXY=http://HOST:PORT"),
        ("http_proxy", " http://127.0.0.1:8", "export http_proxy=http://HOST:PORT"),
    ],
)
def test_a_proxy_that_cannot_be_used_is_named(
    name: str, value: str, hint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    for use in (lambda: ApiClient("http://10.255.255.1:9"), lambda: repository_files("a/b", None)):
        with pytest.raises(K2Error, match=f"{name} '.*' is not a proxy") as caught:
            use()
        assert caught.value.exit_code == 1
        assert caught.value.hint is not None
        assert caught.value.hint.startswith(hint)


@pytest.mark.parametrize("content", [None, "no certificate"])
def test_a_file_of_authorities_that_cannot_be_used_is_named(
    content: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "ca.pem"
    if content is not None:
        file.write_text(content)
    monkeypatch.setenv("SSL_CERT_FILE", str(file))
    for use in (lambda: ApiClient("https://10.255.255.1:9"), lambda: repository_files("a/b", None)):
        with pytest.raises(K2Error, match=f"SSL_CERT_FILE '{file}' cannot be used") as caught:
            use()
        assert caught.value.hint == "unset SSL_CERT_FILE"


@pytest.mark.parametrize("password", ["secret", "a/secret", "a@secret", "a/b@secret"])
def test_the_password_of_a_proxy_is_not_printed(
    password: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ALL_PROXY", f"socks://me:{password}@127.0.0.1:1")
    error = unusable_proxy()
    assert error is not None
    assert "secret" not in f"{error.message} {error.hint}"


def test_a_proxy_that_does_not_answer_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{port}")
    client = ApiClient("http://server.invalid:9")
    with pytest.raises(K2Error, match=r"through the proxy .* of http_proxy") as caught:
        client.models()
    assert str(caught.value.hint).startswith("unset http_proxy")
    monkeypatch.setenv("NO_PROXY", "server.invalid")
    assert proxy_for("http://server.invalid:9/v1") is None


def test_a_socks5_proxy_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    greetings = []
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            connection, _ = listener.accept()
            with connection:
                greetings.append(connection.recv(16))
                connection.sendall(b"\x05\x00")
                greetings.append(connection.recv(64))
                connection.sendall(b"\x05\x00\x00\x01\0\0\0\0\0\0")
                connection.recv(4096)
                connection.sendall(b'HTTP/1.1 200 OK\r\nContent-Length: 11\r\n\r\n{"data":[]}')

        thread = threading.Thread(target=serve)
        thread.start()
        monkeypatch.setenv("ALL_PROXY", f"socks5h://127.0.0.1:{listener.getsockname()[1]}")
        with ApiClient("http://10.255.255.1:9") as client:
            assert client.models() == []
        thread.join(10)
    assert greetings[0][:1] == b"\x05"
    assert b"10.255.255.1" in greetings[1] or socket.inet_aton("10.255.255.1") in greetings[1]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    name=st.sampled_from(NAMES),
    scheme=st.sampled_from(["", "http://", "https://", "socks5://", "socks5h://", "ftp://", "://"]),
    rest=st.text("a1:/@[]%. é\\", max_size=12),
    exempt=st.sampled_from(["", "*", "::1", "[::1]", "::1/128", "10.0.0.0/8", "a b", ".x"]),
)
def test_an_environment_that_is_not_refused_makes_a_client(
    name: str, scheme: str, rest: str, exempt: str
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(name, scheme + rest)
        patch.setenv("NO_PROXY", exempt)
        if unusable_proxy() is None:
            httpx2.Client().close()
        elif exempt != "*":
            with pytest.raises(K2Error):
                ApiClient("http://10.255.255.1:9")


def test_a_proxy_that_does_not_answer_is_named_without_its_password(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # bound, but it does not listen: connections are refused
        port = unused.getsockname()[1]
        monkeypatch.setenv("https_proxy", f"http://me:secret@127.0.0.1:{port}")
        with pytest.raises(K2Error) as caught:
            repository_files("a/b", None)
    assert f"through the proxy 'http://…@127.0.0.1:{port}' of https_proxy" in caught.value.message
    assert "secret" not in caught.value.message
    assert (caught.value.hint or "").startswith("unset https_proxy")


def test_the_proxy_of_an_address_is_the_one_that_the_library_takes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert proxy_for("https://example.org") is None
    monkeypatch.setenv("ALL_PROXY", "socks5://a:1")
    assert proxy_for("https://example.org/x") == ("ALL_PROXY", "socks5://a:1")
    monkeypatch.setenv("HTTPS_PROXY", "http://b:2")
    assert proxy_for("https://example.org/x") == ("HTTPS_PROXY", "http://b:2")
    monkeypatch.setenv("https_proxy", "http://c:3")
    assert proxy_for("https://example.org/x") == ("https_proxy", "http://c:3")
    assert proxy_for("http://example.org/x") == ("ALL_PROXY", "socks5://a:1")
    monkeypatch.setenv("NO_PROXY", "example.org")
    assert proxy_for("https://example.org/x") is None
