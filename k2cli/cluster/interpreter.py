"""Finds the Python that runs k2 on another machine.

A command over ssh gets another PATH than a terminal: on a Mac without what Homebrew, uv or conda
have written into the shell's start-up files. So the places are looked at one by one, the
environment that ``k2 cluster prepare`` makes first.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import PurePosixPath
from typing import Protocol

import msgspec

from k2cli import __version__
from k2cli.cluster.nodes import Completed
from k2cli.errors import ClusterError

# Relative to the home folder, in which sshd starts a command.
MANAGED_PYTHON = ".k2/env/bin/python"
_USUAL_COMMANDS = (".local/bin/k2", "/opt/homebrew/bin/k2", "/usr/local/bin/k2")
_PROGRAM = """
import json, sys
try:
    import k2cli
    version = k2cli.__version__
except ImportError:
    version = None
print(json.dumps({"k2": version, "path": sys.executable, "python": list(sys.version_info[:3])}))
"""


class Run(Protocol):
    """Runs a command on the node: ``SshNode.run``."""

    def __call__(self, arguments: Sequence[str], input: bytes | None = None, /) -> Completed: ...


class Interpreter(msgspec.Struct, frozen=True):
    """A Python on a node: its path, version, and the version of k2 that it imports, if any."""

    path: str
    python: tuple[int, int, int]
    k2: str | None


def last_line(output: bytes) -> bytes:
    """The answer: before it stands what the user's start-up files print on every login."""
    lines = output.splitlines()
    return lines[-1] if lines else b""


def look_at(run: Run, python: str) -> Interpreter | None:
    """What that interpreter is, or None if it does not run there."""
    # By stdin: not every shell takes a line break in an argument.
    done = run([python, "-P", "-"], _PROGRAM.encode())
    if done.status != 0:
        return None
    try:
        return msgspec.json.decode(last_line(done.stdout), type=Interpreter)
    except msgspec.MsgspecError:
        return None


def interpreters(run: Run) -> Iterator[Interpreter]:
    """Pythons that a node has in the places where k2 may be, in the order of preference."""
    seen: set[str] = set()
    for place in _places(run):
        found = look_at(run, place)
        if found is not None and found.path not in seen:
            seen.add(found.path)
            yield found


def _places(run: Run) -> Iterator[str]:
    yield MANAGED_PYTHON
    command = _k2_of_login_shell(run)
    for path in filter(None, (command, *_USUAL_COMMANDS)):
        if python := _interpreter_of(run, path):
            yield python
    yield sys.executable


def _k2_of_login_shell(run: Run) -> str | None:
    """Where a terminal there would find k2: asked of the user's own shell, as a login shell."""
    shell = last_line(run(["printenv", "SHELL"]).stdout).decode(errors="replace")
    if not shell.startswith("/"):
        return None
    lines = run([shell, "-l", "-c", "command -v k2"]).stdout.decode(errors="replace").splitlines()
    # Start-up files may print whatever they like.
    return next((line for line in reversed(lines) if line.startswith("/")), None)


def _interpreter_of(run: Run, script: str) -> str | None:
    """The interpreter of a script that pip, uv or pipx has written.

    Where its path is long or has spaces, the first line names ``/bin/sh`` and the second the
    interpreter: ``'''exec' "/the path/python" "$0" "$@"``.
    """
    lines = run(["head", "-n", "2", script]).stdout.decode(errors="replace").splitlines()[-2:]
    if not lines or not lines[0].startswith("#!"):
        return None
    first = lines[0][2:].strip()
    if PurePosixPath(first).name == "sh" and len(lines) > 1 and lines[1].startswith("'''exec'"):
        return lines[1].removeprefix("'''exec'").split('"')[1] if '"' in lines[1] else None
    return first if first.startswith("/") and " " not in first else None


def find_interpreter(node: str, run: Run) -> str:
    """The path of the Python there that imports this version of k2.

    Raises:
        ClusterError: if there is none; says whether Python, k2, or only this version is missing.
    """
    found: list[Interpreter] = []
    for interpreter in interpreters(run):
        if interpreter.k2 == __version__:
            return interpreter.path
        found.append(interpreter)
    hint = f"k2 cluster prepare --nodes {node}"
    others = sorted({interpreter.k2 for interpreter in found if interpreter.k2})
    if others:
        raise ClusterError(
            f"node {node} has k2 {', '.join(others)}, and this machine {__version__}", hint
        )
    raise ClusterError(f"k2 is not installed on node {node}", hint)
