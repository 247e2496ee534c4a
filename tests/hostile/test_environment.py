"""Commands without standard streams or without a usable home folder: they work, or say why not."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

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


_ALL = """
import json, sys, traceback
from k2cli import cli
bugs = []
report_bug = cli._report_bug
cli._report_bug = lambda error: bugs.append(traceback.format_exc()) or report_bug(error)
ends = []
for words in json.loads(sys.argv[2]):
    sys.argv, kept = ["k2", *words], sys.argv
    code = 0
    try:
        cli.main()
    except SystemExit as end:
        code = end.code
    sys.argv = kept
    ends.append([code, bugs.pop() if bugs else ""])
with open(sys.argv[1], "w") as file:
    json.dump(ends, file)
"""
_NAMES = (
    "download", "plan-memory", "quantize", "doctor", "launch", "ps", "logs", "stop", "chat",
    "bench", "cluster", "cluster init", "cluster show", "cluster import", "cluster export",
    "cluster remove", "cluster clean", "cluster prepare", "cluster refresh", "cluster list",
)  # fmt: skip
_CLOSED = {"stdin": "<&-", "all": "<&- >&- 2>&-"}
_HOMES: dict[str, dict[str, str | None]] = {
    "no home": {"HOME": None},
    "a home without a name": {"HOME": ""},
    "a file": {"HOME": "FILE"},
    "a folder that cannot be made": {"HOME": "/proc/nosuch"},
    "nobody": {"HOME": None, "USER": None, "LOGNAME": None},
    "nobody with folders": {
        "HOME": None, "USER": None, "LOGNAME": None,
        "K2_CONFIG_DIR": "NEW", "K2_STATE_DIR": "NEW", "K2_DATA_DIR": "NEW",
    },
}  # fmt: skip
_NOBODY = ("nobody", "nobody with folders")


def ends_of(commands: list[list[str]], tmp_path: Path, code: str = "", **how: Any) -> list[Any]:
    """Run commands one after another in one process; return status and traceback of each."""
    words = [sys.executable, "-c", code + _ALL, str(tmp_path / "ends"), json.dumps(commands)]
    line = f"{shlex.join(words)} {how.pop('closed', '')}"
    done = subprocess.run(["sh", "-c", line], capture_output=True, timeout=120, **how)
    assert (tmp_path / "ends").is_file(), done.stderr
    ends: list[Any] = json.loads((tmp_path / "ends").read_text())
    assert len(ends) == len(commands)
    return ends


def light_commands(toy: Path, tmp_path: Path) -> list[list[str]]:
    return [
        ["ps"], ["logs"], ["stop", "--all"], ["cluster", "list"], ["cluster", "clean"],
        ["plan-memory", str(toy)], ["plan-memory", "~/nosuch"], ["download", str(toy)],
        ["quantize", str(toy), "--to", str(tmp_path / "q"), "--bits", "4", "--dry-run"],
        ["doctor", "--quick", "--record", str(tmp_path / "recorded")],
        ["cluster", "init", "localhost", "--name", "x", "--force"], ["cluster", "show", "x"],
        ["chat", "-p", "x", "--url", "http://127.0.0.1:9"], ["launch", "./nosuch"],
        ["chat", "-p", "x"], ["bench"],
        *([*name.split(), "--help"] for name in _NAMES),
    ]  # fmt: skip


@pytest.mark.parametrize("closed", ["all", pytest.param("stdin", marks=pytest.mark.soak)])
def test_every_command_without_streams(closed: str, toy_k2: Path, tmp_path: Path) -> None:
    commands = light_commands(toy_k2, tmp_path)
    ends = ends_of(commands, tmp_path, closed=_CLOSED[closed])
    for words, (code, bug) in zip(commands, ends, strict=True):
        assert not bug, (words, bug)
        assert code in (0, 1, 2, 5), (words, code)
        assert code == 0 or "--help" not in words


@pytest.mark.parametrize(
    "home",
    [
        pytest.param(name, marks=[] if name in ("a file", *_NOBODY) else [pytest.mark.soak])
        for name in _HOMES
    ],
)
def test_every_command_without_a_home(home: str, toy_k2: Path, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    commands = light_commands(toy_k2, tmp_path)
    environment = {name: value for name, value in os.environ.items() if name not in _FOLDERS}
    for name, value in _HOMES[home].items():
        environment.pop(name, None)
        if value is not None:
            places = {"FILE": str(file), "NEW": str(tmp_path / "new" / name)}
            environment[name] = places.get(value, value)
    code = _NO_ENTRY.split("from k2cli")[0] if home in _NOBODY else ""
    ends = ends_of(commands, tmp_path, code, env=environment, stdin=subprocess.DEVNULL)
    for words, (code, bug) in zip(commands, ends, strict=True):
        assert not bug, (words, bug)
        assert code in (0, 1, 2, 5), (words, code)
        assert code == 0 or "--help" not in words
    if home == "nobody with folders":
        done = dict(zip(map(tuple, commands), ends, strict=True))
        assert done[("ps",)][0] == done[("plan-memory", str(toy_k2))][0] == 0
        assert done[("doctor", "--quick", "--record", str(tmp_path / "recorded"))][0] in (0, 5)
        assert (tmp_path / "recorded" / "manifest.json").is_file()
