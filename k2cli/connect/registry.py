"""The agents that k2 knows, by the names that users type."""

from __future__ import annotations

from k2cli.connect.agents import (
    aider,
    claude,
    cline,
    codex,
    continue_dev,
    environment,
    opencode,
    zed,
)
from k2cli.connect.settings import Agent
from k2cli.errors import UsageError

AGENTS: tuple[Agent, ...] = (
    claude.AGENT,
    codex.AGENT,
    opencode.AGENT,
    aider.AGENT,
    cline.AGENT,
    continue_dev.AGENT,
    zed.AGENT,
    environment.AGENT,
)


def agent_named(name: str) -> Agent:
    """Return the agent of a name.

    Raises:
        UsageError: if k2 knows none of that name.
    """
    for agent in AGENTS:
        if name.lower() in (agent.name, agent.title.lower()):
            return agent
    names = ", ".join(agent.name for agent in AGENTS)
    raise UsageError(
        f"'{name}' is no agent that k2 knows; it knows {names}",
        "k2 connect env, for any other program",
    )
