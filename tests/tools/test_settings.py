"""The file of MCP servers: its form, and who may write it."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from k2cli.errors import UsageError
from k2cli.tools.settings import ServerSettings, read_server_file


@pytest.fixture
def path(tmp_path: Path) -> Path:
    tmp_path.chmod(0o700)
    return tmp_path / "mcp.json"


def write(path: Path, servers: dict[str, Any], mode: int = 0o600) -> None:
    path.write_text(json.dumps({"mcpServers": servers, "other": 1}))
    path.chmod(mode)


def test_the_form_of_other_programs(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKEN", "s3cret")
    write(
        path,
        {
            "git": {"command": "mcp-server-git", "args": ["-r", "."], "env": {"A": "${TOKEN}"}},
            "web": {"type": "http", "url": "https://x.example/mcp", "headers": {"K": "${TOKEN}"}},
            "odd": {"command": 3},
        },
    )
    file = read_server_file(path)
    assert file.names == ["git", "web", "odd"]
    git = file.server("git")
    assert git == ServerSettings("git", "mcp-server-git", ("-r", "."), {"A": "s3cret"})
    assert file.server("web").headers == {"K": "s3cret"}
    assert file.server("web").place == "x.example"
    with pytest.raises(UsageError, match="server 'odd'"):
        file.server("odd")
    with pytest.raises(UsageError, match="has no server 'none'; it has git, web, odd"):
        file.server("none")


@pytest.mark.parametrize(
    ("entry", "problem"),
    [
        ({}, "either 'command' or 'url'"),
        ({"command": "a", "url": "http://b"}, "either 'command' or 'url'"),
        ({"url": "file:///etc/passwd"}, "is not an HTTP address"),
        ({"command": "a", "args": "text"}, "Expected `array`"),
        ({"command": "a\0b"}, "no program can be given"),
        ({"command": "a", "env": {"B": "${UNSET_OF_TEST}"}}, "UNSET_OF_TEST is not set"),
        ({"command": "a", "timeout_seconds": 0}, "'timeout_seconds'"),
        ({"url": "http://b", "headers": {"K": "${LINES_OF_TEST}"}}, "header 'K' has characters"),
        ({"url": "http://b", "headers": {"a b": "x"}}, "header 'a b' has characters"),
        ({"url": "${LINES_OF_TEST}"}, "'${LINES_OF_TEST}' is not an HTTP address"),
    ],
)
def test_wrong_entries(
    path: Path, entry: dict[str, Any], problem: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LINES_OF_TEST", "s3cret\n")
    write(path, {"x": entry})
    with pytest.raises(UsageError) as error:
        read_server_file(path).server("x")
    assert problem in error.value.message
    assert "s3cret" not in error.value.message


def test_a_file_that_others_may_write(path: Path) -> None:
    write(path, {"x": {"command": "a"}}, 0o664)
    with pytest.raises(UsageError, match="can be written by other users") as error:
        read_server_file(path)
    assert error.value.hint == f"chmod go-w '{path}'"
    path.chmod(0o644)
    assert read_server_file(path).server("x").command == "a"
    write(path, {"x": {"command": "a", "env": {"KEY": "1"}}}, 0o644)
    with pytest.raises(UsageError, match="can be read by other users"):
        read_server_file(path).server("x")
    path.chmod(0o600)
    path.parent.chmod(0o777)
    with pytest.raises(UsageError, match="the folder"):
        read_server_file(path)


def test_a_file_that_is_missing_or_damaged(path: Path) -> None:
    with pytest.raises(UsageError, match="there is no") as missing:
        read_server_file(path)
    assert missing.value.hint is not None
    subprocess.run(missing.value.hint, shell=True, check=True, umask=0o077)  # as it is, in a shell
    assert read_server_file(path).names == ["time"]
    for text in ("{", "[]", '{"mcpServers": []}', "[" * 10_000, "\xff"):
        path.write_text(text, encoding="latin-1")
        path.chmod(0o600)
        with pytest.raises(UsageError, match="cannot be read"):
            read_server_file(path)
