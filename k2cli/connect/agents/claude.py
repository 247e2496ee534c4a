"""Claude Code: Anthropic's API, set by variables or by the ``env`` of its ``settings.json``."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from k2cli.connect.config_file import ConfigChange, home_folder
from k2cli.connect.endpoint import PLACEHOLDER_KEY, Endpoint
from k2cli.connect.formats.patch import REMOVE
from k2cli.connect.settings import (
    Agent,
    Settings,
    Value,
    authority_environment,
    key_value,
)

_TOKEN = "ANTHROPIC_AUTH_TOKEN"
_ELSEWHERE = (
    # Sent beside the right one, so the user's own key would reach the run.
    "ANTHROPIC_API_KEY",
    # These choose another service, whatever the address says.
    "CLAUDE_CODE_USE_BEDROCK",
    "CLAUDE_CODE_USE_VERTEX",
    "CLAUDE_CODE_USE_FOUNDRY",
)


def settings(endpoint: Endpoint) -> Settings:
    """Return the settings of Claude Code for an endpoint."""
    public = _public(endpoint)
    token: dict[str, Value] = {_TOKEN: key_value(endpoint)}
    return Settings(
        environment={**public, **token, **authority_environment(endpoint, "NODE_EXTRA_CA_CERTS")},
        unset=_ELSEWHERE,
        start=("claude",),
        start_written=("claude",),
        files=(ConfigChange(_folder() / "settings.json", "json", _patch(endpoint, public)),),
        arguments=("--settings", json.dumps(_over_the_file(endpoint, public))),
        notes=(
            "values in Claude Code's settings.json override variables of the shell",
            "each start of claude asks for the key with the command in apiKeyHelper",
        )
        if endpoint.key
        else ("values in Claude Code's settings.json override variables of the shell",),
    )


def _public(endpoint: Endpoint) -> dict[str, str]:
    """Return the variables without the key.

    The names of Anthropic's models stand for the run's, so that background tasks, subagents and
    ``/model`` ask for a model that there is.
    """
    model = endpoint.model
    variables = {
        "ANTHROPIC_BASE_URL": endpoint.url,
        "ANTHROPIC_MODEL": model,
        "ANTHROPIC_DEFAULT_HAIKU_MODEL": model,
        "ANTHROPIC_DEFAULT_SONNET_MODEL": model,
        "ANTHROPIC_DEFAULT_OPUS_MODEL": model,
        "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
    }
    if endpoint.context_tokens is not None:
        variables["CLAUDE_CODE_MAX_CONTEXT_TOKENS"] = str(endpoint.context_tokens)
        variables["CLAUDE_CODE_MAX_OUTPUT_TOKENS"] = str(endpoint.output_tokens)
    return variables


def _over_the_file(endpoint: Endpoint, public: dict[str, str]) -> dict[str, Any]:
    """Return settings for an option, which counts more than the file; the file more than variables.

    They are on a command line, so the key is not among them. A token of another service in the
    file would be sent in its place, unless an empty one replaces it.
    """
    if endpoint.key is None:
        return {"env": {**public, _TOKEN: PLACEHOLDER_KEY}}
    return {"apiKeyHelper": endpoint.key.command_line, "env": {**public, _TOKEN: ""}}


def _patch(endpoint: Endpoint, public: dict[str, str]) -> dict[str, Any]:
    authority = authority_environment(endpoint, "NODE_EXTRA_CA_CERTS")
    if endpoint.key is None:
        return {"env": {**public, _TOKEN: key_value(endpoint), **authority}}
    # A token in the file would count more than the command that prints the key.
    env = {**public, _TOKEN: REMOVE, **authority}
    return {"apiKeyHelper": endpoint.key.command_line, "env": env}


def _folder() -> Path:
    if named := os.environ.get("CLAUDE_CONFIG_DIR"):
        return Path(named)
    return home_folder() / ".claude"


AGENT = Agent(
    "claude",
    "Claude Code",
    "claude",
    "npm install -g @anthropic-ai/claude-code",
    settings,
    "environment",
)
