"""Commands without standard streams or without a usable home folder: they work, or say why not."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

_NO_ENTRY = """
import pwd, sys
def none(*_): raise KeyError("no entry")
pwd.getpwuid = pwd.getpwnam = none
from k2cli.cli import main
main()
"""
_FOLDERS = ("K2_CONFIG_DIR", "K2_STATE_DIR", "K2_DATA_DIR", "XDG_CONFIG_HOME", "XDG_STATE_HOME")


def shell(line: str) -> subprocess.CompletedProcess[str]:
    line = line.replace("k2 ", f"{sys.executable} -m k2cli ", 1)
    return subprocess.run(["sh", "-c", line], capture_output=True, text=True, timeout=60)


def without_home(code: list[str], *arguments: str, **changes: str) -> tuple[int, str]:
    kept = {name: value for name, value in os.environ.items() if name not in (*_FOLDERS, "HOME")}
    done = subprocess.run(
        [sys.executable, *code, *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        stdin=subprocess.DEVNULL,
        env={**kept, **changes},
    )
    assert "internal error" not in done.stderr, done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stderr


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&-", ">&- 2>&-", "<&- >&- 2>&-"])
@pytest.mark.parametrize(
    ("command", "status"),
    [
        ("ps", 0),
        ("plan-memory ./nosuch", 2),
        ("--version", 0),
        ("chat --url http://127.0.0.1:9", 2),
    ],
)
def test_closed_descriptors(closed: str, command: str, status: int) -> None:
    if command.startswith("chat") and "<&-" not in closed:
        closed += " </dev/null"
    done = shell(f"k2 {command} {closed}")
    assert "internal error" not in done.stderr
    assert done.returncode == status, done.stderr


def test_a_closed_descriptor_is_not_taken_by_a_file(tmp_path: Path) -> None:
    """What is printed to a closed stream goes nowhere, not into a file that k2 opens."""
    config = tmp_path / "config.json"
    config.write_text("[]")
    assert shell(f"k2 plan-memory {tmp_path} >&- 2>&-").returncode == 1
    assert config.read_text() == "[]"


@pytest.mark.parametrize("command", [["ps"], ["cluster", "list"], ["logs"], ["stop", "--all"]])
def test_no_home_and_no_entry(command: list[str]) -> None:
    status, said = without_home(["-c", _NO_ENTRY], *command)
    assert status == 1
    assert "HOME is not set" in said


def test_no_home_but_an_entry() -> None:
    assert without_home(["-m", "k2cli"], "--version")[0] == 0


def test_the_home_of_an_unknown_user() -> None:
    status, said = without_home(["-m", "k2cli"], "plan-memory", "~nosuchuser/model", HOME="/tmp")
    assert status == 2
    assert "~nosuchuser/model" in said


def test_home_that_is_a_file(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.touch()
    hostfile = tmp_path / "hosts.json"
    hostfile.write_text('[{"ssh": "a", "ips": ["10.0.0.1"]}]')
    for command in (
        ["ps"],
        ["logs"],
        ["cluster", "list"],
        ["cluster", "import", str(hostfile), "--name", "x"],
        ["plan-memory", str(tmp_path)],
        ["chat", "-p", "hello"],
    ):
        status, said = without_home(["-m", "k2cli"], *command, HOME=str(home))
        assert status in (0, 1, 2, 5), (command, said)
