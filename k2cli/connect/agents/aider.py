"""aider: Chat Completions, set by variables, or by its YAML and a file of the model's limits."""

from __future__ import annotations

from typing import Any

from k2cli.connect.config_file import ConfigChange, home_folder
from k2cli.connect.endpoint import Endpoint
from k2cli.connect.formats.patch import REMOVE
from k2cli.connect.settings import (
    Agent,
    Settings,
    TemporaryFile,
    Value,
    authority_environment,
    key_value,
)

_METADATA = ".aider.model.metadata.json"


def settings(endpoint: Endpoint) -> Settings:
    """Return the settings of aider for an endpoint."""
    name = f"openai/{endpoint.model}"
    key: dict[str, Value] = {"OPENAI_API_KEY": key_value(endpoint)}
    authority = authority_environment(endpoint, "SSL_CERT_FILE")
    options: dict[str, Any] = {
        "model": name,
        "weak-model": name,
        "edit-format": "diff",
        "openai-api-base": endpoint.base_url,
        # The key of a run is not written: aider reads it from the environment.
        "openai-api-key": key_value(endpoint) if endpoint.key is None else REMOVE,
        "show-model-warnings": False,
    }
    files = [ConfigChange(home_folder() / ".aider.conf.yml", "yaml", options)]
    temporary = []
    if endpoint.context_tokens is not None:
        limits = _metadata(endpoint, name)
        files.append(ConfigChange(home_folder() / _METADATA, "json", limits))
        variable = "AIDER_MODEL_METADATA_FILE"
        temporary.append(TemporaryFile("metadata.json", "json", limits, variable=variable))
    return Settings(
        environment={
            "OPENAI_API_BASE": endpoint.base_url,
            **key,
            "AIDER_MODEL": name,
            "AIDER_WEAK_MODEL": name,
            "AIDER_EDIT_FORMAT": "diff",
            "AIDER_SHOW_MODEL_WARNINGS": "false",
            **authority,
        },
        start=("aider",),
        start_written=("aider",),
        files=tuple(files),
        after_write=authority if endpoint.key is None else {**key, **authority},
        temporary=tuple(temporary),
        notes=(
            "aider learns the context of the run from a file of model metadata, which --write and "
            "-- COMMAND make",
        ),
    )


def _metadata(endpoint: Endpoint, name: str) -> dict[str, Any]:
    limits = {
        "max_tokens": endpoint.output_tokens,
        "max_input_tokens": endpoint.context_tokens,
        "max_output_tokens": endpoint.output_tokens,
        "input_cost_per_token": 0,
        "output_cost_per_token": 0,
        "litellm_provider": "openai",
        "mode": "chat",
    }
    return {name: limits}


AGENT = Agent(
    "aider", "aider", "aider", "python -m pip install aider-chat", settings, "environment"
)
