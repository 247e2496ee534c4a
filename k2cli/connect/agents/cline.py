"""Cline: Chat Completions, set by the file of providers that its command line program reads."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from k2cli.connect.config_file import ConfigChange, home_folder
from k2cli.connect.endpoint import PLACEHOLDER_KEY, Endpoint
from k2cli.connect.formats.patch import IfMissing
from k2cli.connect.settings import Agent, Settings, TemporaryFile, authority_environment

_PROVIDER = "openai-compatible"


def settings(endpoint: Endpoint) -> Settings:
    """Return the settings of Cline for an endpoint."""
    authority = authority_environment(endpoint, "NODE_EXTRA_CA_CERTS")
    key = PLACEHOLDER_KEY if endpoint.key is None else endpoint.key.value
    patch = _patch(endpoint, key)
    start = ("cline", "-P", _PROVIDER, "-m", endpoint.model)
    notes = ["the extension of an editor has these fields under 'OpenAI Compatible'"]
    if endpoint.key is not None:
        notes.append("Cline takes its key from this file alone, so the key is written there")
    return Settings(
        # Its daemon would keep these settings, and serve later calls with them.
        environment={"CLINE_SESSION_BACKEND_MODE": "local", **authority},
        start_written=start,
        files=(ConfigChange(_file(), "json", patch, private=endpoint.key is not None),),
        after_write=authority,
        arguments=start[1:],
        temporary=(
            TemporaryFile("providers.json", "json", patch, variable="CLINE_PROVIDER_SETTINGS_PATH"),
        ),
        notes=tuple(notes),
    )


def _patch(endpoint: Endpoint, key: str) -> dict[str, Any]:
    provider: dict[str, Any] = {
        "provider": _PROVIDER,
        "apiKey": key,
        "model": endpoint.model,
        "baseUrl": endpoint.base_url,
    }
    return {
        "version": IfMissing(1),
        "lastUsedProvider": _PROVIDER,
        "modes": IfMissing({}),
        "providers": {
            _PROVIDER: {
                "settings": provider,
                "updatedAt": IfMissing(time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime())),
                "tokenSource": "manual",
            }
        },
    }


def _file() -> Path:
    if named := os.environ.get("CLINE_DATA_DIR"):
        return Path(named) / "settings" / "providers.json"
    root = os.environ.get("CLINE_DIR")
    folder = Path(root) if root else home_folder() / ".cline"
    return folder / "data" / "settings" / "providers.json"


AGENT = Agent("cline", "Cline", "cline", "npm install -g cline", settings, "files")
