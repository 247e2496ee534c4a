"""Finds the Python that runs k2 on another machine.

A command over ssh gets another PATH than a terminal: on a Mac without what Homebrew, uv or conda
have written into the shell's start-up files. So the places are looked at one by one, the
environment that ``k2 cluster prepare`` makes first.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Protocol

import msgspec

from k2cli import __version__
from k2cli.agent import self_report
from k2cli.agent.own_wheel import own_digest
from k2cli.errors import ClusterError
from k2cli.nodes.node import Completed

# Relative to the home folder, in which sshd starts a command.
MANAGED_PYTHON = ".k2/env/bin/python"
_USUAL_COMMANDS = (".local/bin/k2", "/opt/homebrew/bin/k2", "/usr/local/bin/k2")


class Run(Protocol):
    """Runs a command on the node: ``SshNode.run``."""

    def __call__(self, arguments: Sequence[str], input: bytes | None = None, /) -> Completed: ...


class Report(msgspec.Struct, frozen=True):
    """What an interpreter on a node has: see ``self_report``. ``k2`` is the version, if any."""

    executable: str
    python: tuple[int, int, int]
    k2: str | None
    digest: str | None
    packages: dict[str, str | None]


def last_line(output: bytes) -> bytes:
    """The answer: before it stands what the user's start-up files print on every login."""
    lines = output.splitlines()
    return lines[-1] if lines else b""


def report_of(run: Run, python: str) -> Report | None:
    """What that interpreter has, or None if it does not run there."""
    # By stdin: nothing need be installed there, and not every shell takes a line break in an
    # argument. Without -P, which Pythons before 3.11 do not know.
    done = run([python, "-"], Path(self_report.__file__).read_bytes())
    if done.status != 0:
        return None
    try:
        return msgspec.json.decode(last_line(done.stdout), type=Report)
    except msgspec.MsgspecError:
        return None


def _reports(run: Run) -> Iterator[Report]:
    """Of Pythons in the places where k2 may be, in the order of preference."""
    seen: set[str] = set()
    for place in _places(run):
        found = report_of(run, place)
        if found is not None and found.executable not in seen:
            seen.add(found.executable)
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


def find_interpreter(node: str, run: Run, recorded: str | None = None) -> Report:
    """The Python there that imports this version of k2.

    Args:
        node: its name, for people.
        run: runs a command there.
        recorded: where it was when somebody looked last; taken if it has this very code, which is
            one command where looking everywhere takes up to ten.

    Raises:
        ClusterError: if there is none; says whether k2 or only this version is missing.
    """
    known = report_of(run, recorded) if recorded is not None else None
    if known is not None and (known.k2, known.digest) == (__version__, own_digest()):
        return known
    found: list[Report] = []
    for report in _reports(run):
        if report.k2 == __version__:
            return report
        found.append(report)
    hint = f"k2 cluster prepare --nodes {node}"
    others = sorted({report.k2 for report in found if report.k2})
    if others:
        raise ClusterError(
            f"node {node} has k2 {', '.join(others)}, and this machine {__version__}", hint
        )
    raise ClusterError(f"k2 is not installed on node {node}", hint)
