"""Names of this machine on a Mac whose host name the network has chosen."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from k2cli.nodes.node import is_this_machine
from k2cli.system import bonjour
from tests.support.as_macos import make_program, on_macos


@pytest.fixture(autouse=True)
def of_a_mac(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    text = 'test "$1 $2" = "--get LocalHostName" && echo Studio-1'
    monkeypatch.setattr(bonjour, "_PROGRAM", str(make_program(tmp_path, "scutil", text)))
    monkeypatch.setattr(socket, "gethostname", lambda: "client-100-34-5-1.vpn.example")
    bonjour.bonjour_name.cache_clear()
    yield
    bonjour.bonjour_name.cache_clear()


@pytest.mark.parametrize(
    ("name", "is_own"),
    [
        ("studio-1", True),
        ("Studio-1.local", True),
        ("client-100-34-5-1.vpn.example", True),
        ("localhost", True),
        ("studio-2.local", False),
        ("studio-1.lan", False),
        ("", False),
        (".local", False),
    ],
)
def test_the_name_for_bonjour_means_this_machine(name: str, *, is_own: bool) -> None:
    with on_macos():
        assert is_this_machine(name) == is_own


def test_without_the_program_there_is_no_such_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bonjour, "_PROGRAM", "/no/such/program")
    with on_macos():
        assert not is_this_machine("studio-1")
        assert not is_this_machine("")
        assert not is_this_machine(".local")
