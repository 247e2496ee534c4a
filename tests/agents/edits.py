"""One agent completes the edit of a file against a run whose rank is scripted."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from tests.agents.agents import AFTER, BEFORE, FILE, Agent
from tests.agents.recording import Exchange, Recorder
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


def try_edit(
    agent: Agent, program: Path, model: Path, folder: Path, opens: str = "<think>"
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
            done = subprocess.run(
                [*isolated, *command, str(program), *agent.arguments],
                cwd=work,
                env=_environment(agent, home, f"http://127.0.0.1:{port}"),
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


def _environment(agent: Agent, home: Path, url: str) -> dict[str, str]:
    for name, text in agent.files.items():
        path = home / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text.replace("{url}", url))
    given = {name: value.replace("{url}", url) for name, value in agent.environment.items()}
    # Nothing else of this machine: no keys, no proxies, no configuration.
    kept = {name: os.environ[name] for name in ("PATH", "LANG", "TMPDIR") if name in os.environ}
    return {**kept, "HOME": str(home), "TERM": "dumb", **given}
