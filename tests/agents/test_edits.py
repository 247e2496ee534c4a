"""Agents that others wrote complete the edit of a file.

Guard, server and HTTP are real; the rank plays a script in the format of K2-Thinking or K2.5:
reasoning, then a call of the agent's own tool. An agent reaches nothing but the run.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.agents.agents import AGENTS, FINAL, OPENCODE, Agent
from tests.agents.edits import Trial, Way, isolation, try_edit
from tests.agents.installation import NotInstalled, install
from tests.support.thinking_model import REASONING_BEGINS, TEMPLATES, thinking_model

pytestmark = [
    pytest.mark.ranks,
    pytest.mark.timeout(900),
    pytest.mark.skipif(isolation() is None, reason="needs network namespaces (unshare --net)"),
]


def _trial(
    agent: Agent, toy_k2: Path, folder: Path, form: str = "k2-thinking", way: Way = "written"
) -> Trial:
    try:
        program = install(agent)
    except NotInstalled as error:
        pytest.skip(f"{agent.name} {agent.version}: {error}")
    model = thinking_model(toy_k2, folder / "model", form)
    return try_edit(agent, program, model, folder / "trial", REASONING_BEGINS[form], way)


def _check(trial: Trial) -> None:
    assert trial.exit_status == 0, trial.report()
    assert trial.edited, trial.report()
    own = [one for one in trial.exchanges if one.path.partition("?")[0] == trial.agent.path]
    turns = [one for one in own if one.body.get("tools")] if trial.agent.calls else own
    assert len(turns) == len(trial.agent.calls) + 1, trial.report()
    assert {one.status for one in own} == {200}, trial.report()
    if trial.agent.calls:
        assert FINAL in trial.output, trial.report()
    # Reasoning and the markers of K2's format never get into what the agent shows as text.
    for marker in ("<|tool_call", "<think>", "</think>"):
        assert marker not in trial.output, trial.report()
        assert marker not in json.dumps([one.body for one in own]), trial.report()


def test_opencode_completes_an_edit(toy_k2: Path, tmp_path: Path) -> None:
    _check(_trial(OPENCODE, toy_k2, tmp_path))


@pytest.mark.soak
@pytest.mark.parametrize("agent", AGENTS, ids=[agent.name for agent in AGENTS])
@pytest.mark.parametrize("form", TEMPLATES)
def test_every_agent_completes_an_edit(
    agent: Agent, form: str, toy_k2: Path, tmp_path: Path
) -> None:
    _check(_trial(agent, toy_k2, tmp_path, form))


@pytest.mark.soak
@pytest.mark.parametrize("agent", AGENTS, ids=[agent.name for agent in AGENTS])
def test_every_agent_completes_an_edit_that_k2_runs(
    agent: Agent, toy_k2: Path, tmp_path: Path
) -> None:
    """No file of the agent's configuration names the run afterwards."""
    _check(_trial(agent, toy_k2, tmp_path, way="run"))
    configuration = {
        "settings.json", "config.toml", "opencode.json", "providers.json", ".aider.conf.yml",
        ".aider.model.metadata.json",
    }  # fmt: skip
    home = tmp_path / "trial" / "home"
    found = [path for path in home.rglob("*") if path.name in configuration]
    assert [path for path in found if b"127.0.0.1" in path.read_bytes()] == []
