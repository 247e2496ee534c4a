"""opencode: Chat Completions, set by ``opencode.json`` or by a variable with the same content."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from k2cli.connect.config_file import ConfigChange, home_folder
from k2cli.connect.endpoint import KEY_VARIABLE, Endpoint
from k2cli.connect.formats.patch import REMOVE
from k2cli.connect.settings import KEY, Agent, Settings, Value, authority_environment

_PROVIDER = "k2"


def settings(endpoint: Endpoint) -> Settings:
    """Return the settings of opencode for an endpoint."""
    patch = _patch(endpoint)
    content = _without_removed(patch)
    key: dict[str, Value] = {} if endpoint.key is None else {KEY_VARIABLE: KEY}
    key |= authority_environment(endpoint, "NODE_EXTRA_CA_CERTS")
    return Settings(
        environment={"OPENCODE_CONFIG_CONTENT": json.dumps(content), **key},
        start=("opencode",),
        start_written=("opencode",),
        files=(ConfigChange(_file(), "jsonc", patch),),
        after_write=key,
    )


def _patch(endpoint: Endpoint) -> dict[str, Any]:
    model: dict[str, Any] = {
        "name": endpoint.model,
        "tool_call": endpoint.tools,
        "reasoning": endpoint.reasoning,
    }
    if endpoint.context_tokens is not None:
        model["limit"] = {"context": endpoint.context_tokens, "output": endpoint.output_tokens}
    api_key: Any = REMOVE if endpoint.key is None else f"{{env:{KEY_VARIABLE}}}"
    provider = {
        "npm": "@ai-sdk/openai-compatible",
        "name": _PROVIDER,
        "options": {"baseURL": endpoint.base_url, "apiKey": api_key},
        "models": {endpoint.model: model},
    }
    name = f"{_PROVIDER}/{endpoint.model}"
    return {
        "$schema": "https://opencode.ai/config.json",
        "model": name,
        "small_model": name,
        "provider": {_PROVIDER: provider},
    }


def _without_removed(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_removed(each) for name, each in value.items() if each is not REMOVE}
    return value


def _file() -> Path:
    """Return the configuration of the user: the one that is there, or else a new one."""
    if named := os.environ.get("OPENCODE_CONFIG"):
        return Path(named)
    base = os.environ.get("XDG_CONFIG_HOME")
    folder = (Path(base) if base else home_folder() / ".config") / "opencode"
    with_comments = folder / "opencode.jsonc"
    return with_comments if with_comments.is_file() else folder / "opencode.json"


AGENT = Agent("opencode", "opencode", "opencode", "npm install -g opencode-ai", settings, "files")
