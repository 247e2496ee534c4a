"""Installs the agents in their pinned versions, below one folder that is kept."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from tests.agents.agents import Agent

INSTALL_SECONDS = 400
FOLDER_VARIABLE = "K2_AGENTS_DIR"
"""Environment variable that moves the folder of the agents."""


class NotInstalled(Exception):
    """An agent cannot be installed here; the text says why."""


def agents_folder() -> Path:
    """Return the folder of the agents; git ignores ``.k2``."""
    if named := os.environ.get(FOLDER_VARIABLE):
        return Path(named)
    return Path(__file__).resolve().parents[2] / ".k2" / "agents"


def install(agent: Agent) -> Path:
    """Install an agent, if its version is not there yet, and return its program.

    Raises:
        NotInstalled: if the installer is missing, or fails, for instance without a network.
    """
    folder = agents_folder() / agent.name / agent.version
    bin_folder = folder / ("node_modules/.bin" if agent.installer == "npm" else "bin")
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder / "lock"):
        if not (folder / "complete").exists():
            if agent.installer == "npm":
                _npm(agent, folder)
            else:
                _pip(agent, folder)
            (folder / "complete").touch()
    return bin_folder / agent.program


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _npm(agent: Agent, folder: Path) -> None:
    npm, node = shutil.which("npm"), shutil.which("node")
    if npm is None or node is None:
        raise NotInstalled("npm is not installed")
    (folder / "package.json").write_text('{"private": true}\n')
    package = f"{agent.package}@{agent.version}"
    options = ["--no-audit", "--no-fund", "--ignore-scripts", "--fetch-retries=1"]
    _run([npm, "install", *options, package], folder)
    # The one script of the agent's own package that puts its binary in place; no other one runs.
    if agent.install_script:
        script = folder / "node_modules" / agent.package / agent.install_script
        _run([node, str(script)], script.parent)


def _pip(agent: Agent, folder: Path) -> None:
    _run([sys.executable, "-m", "venv", str(folder)], folder)
    pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet", "--retries", "1"]
    _run([*pip, f"{agent.package}=={agent.version}"], folder)


def _run(command: Sequence[str], folder: Path) -> None:
    try:
        done = subprocess.run(
            command,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=INSTALL_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise NotInstalled(f"{command[0]} took more than {INSTALL_SECONDS} s") from None
    if done.returncode:
        text = done.stdout.decode(errors="replace").strip()
        raise NotInstalled(f"{' '.join(command[:3])} failed: {text[-400:]}")
