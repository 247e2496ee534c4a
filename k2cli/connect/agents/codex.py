"""Codex: OpenAI's Responses API, set by ``config.toml`` or by options with the same names."""

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
_AUTH_MILLISECONDS = 20_000
"""Time for the command that prints the key; Codex itself allows 5 s, which a busy machine needs."""

_OWN_AUTHORITY = (
    "Codex refuses a certificate that vouches for itself (openssl req -x509): the run needs one of "
    "an authority, which SSL_CERT_FILE=ca.pem k2 connect codex names"
)


def settings(endpoint: Endpoint) -> Settings:
    """Return the settings of Codex for an endpoint."""
    environment: dict[str, Value] = {}
    provider = _provider(endpoint)
    given = dict(provider)
    if endpoint.key is not None:
        environment[KEY_VARIABLE] = KEY
        given["env_key"] = KEY_VARIABLE
        provider["auth"] = {
            "command": endpoint.key.command[0],
            "args": list(endpoint.key.command[1:]),
            "timeout_ms": _AUTH_MILLISECONDS,
        }
    else:
        provider["auth"] = REMOVE
    provider["env_key"] = REMOVE
    authority = authority_environment(endpoint, "CODEX_CA_CERTIFICATE")
    arguments = _arguments(endpoint, given)
    patch = {
        **_selection(endpoint),
        "model_providers": {_PROVIDER: provider},
    }
    return Settings(
        environment={**environment, **authority},
        start=("codex", *arguments),
        start_written=("codex",),
        files=(ConfigChange(_folder() / "config.toml", "toml", patch),),
        after_write=authority,
        arguments=arguments,
        notes=(
            "Codex warns that it has no metadata for the model, and goes on",
            *((_OWN_AUTHORITY,) if endpoint.url.startswith("https:") else ()),
        ),
    )


def _selection(endpoint: Endpoint) -> dict[str, Any]:
    members: dict[str, Any] = {"model": endpoint.model, "model_provider": _PROVIDER}
    if endpoint.context_tokens is not None:
        members["model_context_window"] = endpoint.context_tokens
    return members


def _provider(endpoint: Endpoint) -> dict[str, Any]:
    return {"name": _PROVIDER, "base_url": endpoint.base_url, "wire_api": "responses"}


def _arguments(endpoint: Endpoint, provider: dict[str, Any]) -> tuple[str, ...]:
    """Return options that say the same as the file; texts of JSON are also texts of TOML."""
    values = {
        **_selection(endpoint),
        **{f"model_providers.{_PROVIDER}.{name}": value for name, value in provider.items()},
    }
    pairs = [f"{name}={json.dumps(value, ensure_ascii=False)}" for name, value in values.items()]
    return tuple(word for pair in pairs for word in ("-c", pair))


def _folder() -> Path:
    if named := os.environ.get("CODEX_HOME"):
        return Path(named)
    return home_folder() / ".codex"


AGENT = Agent("codex", "Codex", "codex", "npm install -g @openai/codex", settings, "files")
