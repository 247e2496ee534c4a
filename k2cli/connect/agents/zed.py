"""Zed: Chat Completions, set by a provider in its ``settings.json``, which has comments."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from k2cli.connect.config_file import ConfigChange, home_folder
from k2cli.connect.endpoint import Endpoint
from k2cli.connect.formats.patch import ListItem
from k2cli.connect.settings import Agent, Settings, Value, authority_environment, key_value

_PROVIDER = "k2"
_KEY_VARIABLE = "K_2_API_KEY"
"""Zed makes it of the provider's name: it puts ``_`` between letters and digits."""


def settings(endpoint: Endpoint) -> Settings:
    """Return the settings of Zed for an endpoint."""
    provider = {
        "api_url": endpoint.base_url,
        "available_models": ListItem("name", _model(endpoint)),
    }
    patch = {
        "language_models": {"openai_compatible": {_PROVIDER: provider}},
        "agent": {"default_model": {"provider": _PROVIDER, "model": endpoint.model}},
    }
    environment: dict[str, Value] = {
        _KEY_VARIABLE: key_value(endpoint),
        **authority_environment(endpoint, "SSL_CERT_FILE"),
    }
    return Settings(
        environment=environment,
        start_written=("zed",),
        files=(ConfigChange(_folder() / "settings.json", "jsonc", patch),),
        after_write=environment,
        notes=(
            f"Zed wants a key, any text for a run without one: {_KEY_VARIABLE}, if it is started "
            "from a terminal, or its page of LLM providers (agent: open settings)",
        ),
    )


def _model(endpoint: Endpoint) -> dict[str, Any]:
    model: dict[str, Any] = {
        "name": endpoint.model,
        "display_name": endpoint.model,
        # Zed asks for a number.
        "max_tokens": endpoint.context_tokens or 32_768,
        "capabilities": {
            "tools": endpoint.tools,
            "images": False,
            "parallel_tool_calls": False,
            "prompt_cache_key": False,
        },
    }
    if endpoint.output_tokens is not None:
        model["max_output_tokens"] = endpoint.output_tokens
    return model


def _folder() -> Path:
    base = os.environ.get("XDG_CONFIG_HOME")
    return (Path(base) if base else home_folder() / ".config") / "zed"


AGENT = Agent(
    "zed", "Zed", "zed", "https://zed.dev/download", settings, "files", environment_suffices=False
)
