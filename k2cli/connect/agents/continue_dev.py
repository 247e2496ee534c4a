"""Continue: Chat Completions, set by a model in its ``config.yaml``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from k2cli.connect.config_file import ConfigChange, home_folder
from k2cli.connect.endpoint import KEY_VARIABLE, PLACEHOLDER_KEY, Endpoint
from k2cli.connect.formats.patch import REMOVE, IfMissing, ListItem
from k2cli.connect.settings import KEY, Agent, Settings, TemporaryFile, Value


def settings(endpoint: Endpoint) -> Settings:
    """Return the settings of Continue for an endpoint."""
    folder = _folder()
    key: dict[str, Value] = {} if endpoint.key is None else {KEY_VARIABLE: KEY}
    header = {"name": "Local configuration", "version": "1.0.0", "schema": "v1"}
    patch = {
        **{name: IfMissing(value) for name, value in header.items()},
        "models": ListItem("name", _model(endpoint)),
    }
    notes = ["in the editor, choose the model in the list below the chat"]
    if endpoint.key is not None:
        notes.append(
            f"the extensions of editors take the key from a line {KEY_VARIABLE}=... in "
            f"{folder / '.env'}, which only you should be able to read (chmod 600)"
        )
    return Settings(
        environment=key,
        start_written=("cn",),
        files=(ConfigChange(folder / "config.yaml", "yaml", patch),),
        after_write=key,
        temporary=(TemporaryFile("config.yaml", "yaml", patch, option="--config"),),
        notes=tuple(notes),
    )


def _model(endpoint: Endpoint) -> dict[str, Any]:
    api_key = PLACEHOLDER_KEY if endpoint.key is None else f"${{{{ secrets.{KEY_VARIABLE} }}}}"
    model: dict[str, Any] = {
        "name": f"k2: {endpoint.model}",
        "provider": "openai",
        "model": endpoint.model,
        "apiBase": endpoint.base_url,
        "apiKey": api_key,
        "roles": ["chat", "edit", "apply", "summarize"],
        # An empty list would let Continue guess from the model's name.
        "capabilities": ["tool_use"] if endpoint.tools else [],
        "requestOptions": REMOVE,
    }
    if endpoint.context_tokens is not None:
        model["defaultCompletionOptions"] = {
            "contextLength": endpoint.context_tokens,
            "maxTokens": endpoint.output_tokens,
        }
    if endpoint.authority is not None:
        model["requestOptions"] = {"caBundlePath": str(endpoint.authority)}
    return model


def _folder() -> Path:
    if named := os.environ.get("CONTINUE_GLOBAL_DIR"):
        return Path(named)
    return home_folder() / ".continue"


AGENT = Agent(
    "continue",
    "Continue",
    "cn",
    "npm install -g @continuedev/cli, or the extension of your editor",
    settings,
    "files",
)
