"""Search for the Python that runs k2 on another machine.

A command over ssh has another PATH than a terminal: on a Mac it lacks the entries that Homebrew, uv
or conda add in the shell's start-up files. So the usual places are examined one by one, beginning
with the environment that ``k2 cluster prepare`` makes.
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
from k2cli.files import decode_json
from k2cli.nodes.node import Completed

# Relative to the home folder, in which sshd starts a command.
MANAGED_PYTHON = ".k2/env/bin/python"
_USUAL_COMMANDS = (".local/bin/k2", "/opt/homebrew/bin/k2", "/usr/local/bin/k2")


class Run(Protocol):
    """Function that runs a command on the node, such as ``SshNode.run``."""

    def __call__(self, arguments: Sequence[str], input: bytes | None = None, /) -> Completed: ...


class Report(msgspec.Struct, frozen=True):
    """Answer of ``agent.self_report`` from an interpreter on a node. ``k2`` is its version."""

    executable: str
    python: tuple[int, int, int]
    k2: str | None
    digest: str | None
    packages: dict[str, str | None]


def last_line(output: bytes) -> bytes:
    """Return the last line of output: the user's start-up files may print lines before it."""
    lines = output.splitlines()
    return lines[-1] if lines else b""


def report_of(run: Run, python: str) -> Report | None:
    """Ask an interpreter on a node for its report; None if it does not run there."""
    # The program is sent over stdin: nothing needs to be installed, and some shells do not accept
    # a line break in an argument. Pythons before 3.11 do not have -P.
    done = run([python, "-"], Path(self_report.__file__).read_bytes())
    if done.status != 0:
        return None
    try:
        return decode_json(last_line(done.stdout), type=Report)
    except msgspec.MsgspecError:
        return None


def _reports(run: Run) -> Iterator[Report]:
    """Yield the reports of Pythons that may have k2, in the order of preference."""
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
    """Ask the user's shell on the node, as a login shell, for the path of k2."""
    shell = last_line(run(["printenv", "SHELL"]).stdout).decode(errors="replace")
    if not shell.startswith("/"):
        return None
    lines = run([shell, "-l", "-c", "command -v k2"]).stdout.decode(errors="replace").splitlines()
    # Start-up files may print other lines.
    return next((line for line in reversed(lines) if line.startswith("/")), None)


def _interpreter_of(run: Run, script: str) -> str | None:
    """Read the interpreter's path from a script that pip, uv or pipx has written.

    If the path is long or has spaces, the first line names ``/bin/sh`` and the second the
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
    """Find the Python on a node that imports this version of k2.

    Args:
        node: its name, for messages.
        run: runs a command there.
        recorded: the interpreter that was found before; used at once if it has exactly this code,
            which takes one command instead of up to ten.

    Raises:
        ClusterError: if there is none: k2 is not installed, or only in another version.
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
