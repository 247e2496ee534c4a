"""One agent completes the edit of a file against a run whose rank is scripted."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tests.agents.agents import AFTER, BEFORE, FILE, Agent
from tests.agents.recording import Exchange, Recorder
from tests.support.commands import K2
from tests.support.harness import supervised
from tests.support.scripted_answers import ANSWERS_VARIABLE, save_rules

CONTEXT_TOKENS = 131_072
AGENT_SECONDS = 120
_ENCLOSED = Path(__file__).with_name("enclosed.py")


@dataclass(frozen=True, slots=True)
class Trial:
    """What became of an agent's edit."""

    agent: Agent
    exit_status: int
    output: str
    edited: bool
    exchanges: list[Exchange]

    @property
    def refused(self) -> list[Exchange]:
        """The requests that were not answered with success."""
        return [one for one in self.exchanges if one.status is None or one.status >= 400]

    def report(self) -> str:
        """What a failed test shows."""
        lines = [f"{self.agent.name} ended with {self.exit_status}; edited: {self.edited}"]
        for one in self.exchanges:
            lines.append(f"{one.method} {one.path} -> {one.status}")
            if one in self.refused:
                lines.append(one.answer.decode(errors="replace")[:2000])
        return "\n".join([*lines, self.output[-4000:]])


def isolation() -> list[str] | None:
    """Return the command that gives a program namespaces of its own, or None.

    It has an empty network, and what it leaves behind ends with it: Cline starts a daemon.
    """
    if shutil.which("unshare") is None:
        return None
    command = ["unshare", "--net", "--pid", "--fork", "--kill-child", "--mount-proc"]
    if os.geteuid() != 0:
        command.append("--map-root-user")
    tried = subprocess.run([*command, "true"], capture_output=True, check=False)
    return command if tried.returncode == 0 else None


Way = Literal["written", "run"]
"""``k2 connect AGENT --write`` and then the agent, or ``k2 connect AGENT -- AGENT``."""


def try_edit(
    agent: Agent,
    program: Path,
    model: Path,
    folder: Path,
    opens: str = "<think>",
    way: Way = "written",
) -> Trial:
    """Let an agent edit a file in a new folder; it can reach the run and nothing else."""
    home, work = folder / "home", folder / "work"
    home.mkdir(parents=True)
    work.mkdir()
    (work / FILE).write_text(BEFORE)
    save_rules(folder / "answers.json", agent.rules(work, opens))
    isolated = isolation()
    assert isolated is not None
    environment = {ANSWERS_VARIABLE: str(folder / "answers.json")}
    with supervised(
        "local", 1, model=model, context_length=CONTEXT_TOKENS, environment=environment
    ) as run:
        url = run.wait_ready().url
        port = int(url.rstrip("/").removesuffix("/v1").rpartition(":")[2])
        recorder = Recorder(folder / "relay", port)
        try:
            command = [sys.executable, str(_ENCLOSED), str(folder / "relay"), str(port), "--"]
            given = _environment(agent, home)
            started = _started(agent, program, f"http://127.0.0.1:{port}", given, way)
            done = subprocess.run(
                [*isolated, *command, *started],
                cwd=work,
                env=given,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                timeout=AGENT_SECONDS,
                check=False,
            )
        finally:
            recorder.close()
    edited = (work / FILE).read_text() == AFTER
    output = done.stdout.decode(errors="replace")
    return Trial(agent, done.returncode, output, edited, recorder.exchanges())


def _started(
    agent: Agent, program: Path, url: str, environment: dict[str, str], way: Way
) -> list[str]:
    """Return the command that starts the agent, pointed at the run; write its files before."""
    connect = [*K2, "connect", agent.name, "--url", url]
    if way == "run":
        return [*connect, "--", str(program), *agent.arguments]
    done = subprocess.run(
        [*connect, "--write", "--yes", "--json"],
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    _, *options = shlex.split(json.loads(done.stdout)["start_written"])
    return [str(program), *options, *agent.arguments]


def _environment(agent: Agent, home: Path) -> dict[str, str]:
    # Nothing else of this machine: no keys, no proxies, no configuration.
    kept = {name: os.environ[name] for name in ("PATH", "LANG", "TMPDIR") if name in os.environ}
    root = str(Path(__file__).resolve().parents[2])
    return {**kept, "PYTHONPATH": root, "HOME": str(home), "TERM": "dumb", **agent.environment}
