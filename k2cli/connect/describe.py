"""The settings of an agent as text to copy, and as a document for programs; neither has the key."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from k2cli.connect.config_file import Format, file_text
from k2cli.connect.endpoint import Endpoint
from k2cli.connect.formats.patch import apply_patch, settled
from k2cli.connect.settings import Agent, Value
from k2cli.connect.shells import Shell, command_line, lines

SCHEMA_VERSION = 1
HIDDEN_KEY = "KEY"
"""Printed where a file needs the key itself."""


@dataclass(frozen=True, slots=True)
class FileText:
    """A configuration file as it is if nothing else is in it."""

    path: Path
    format: Format
    text: str
    data: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Description:
    """The settings of one agent, as ``k2 connect AGENT`` prints them.

    Attributes:
        exports: lines for a shell that set the environment.
        files: what the configuration files must have.
        exports_written: lines for a shell that a configured agent still needs.
        start: the command after the lines, empty if the environment does not suffice.
        start_written: the command once the files are written.
    """

    agent: Agent
    endpoint: Endpoint
    exports: tuple[str, ...]
    files: tuple[FileText, ...]
    exports_written: tuple[str, ...]
    start: str
    start_written: str
    environment: Mapping[str, Value]
    unset: tuple[str, ...]
    notes: tuple[str, ...]

    def document(self, run_id: str | None) -> dict[str, Any]:
        """Return the document of ``--json``; the value of a variable with the key is null."""
        endpoint = self.endpoint
        return {
            "schema_version": SCHEMA_VERSION,
            "agent": self.agent.name,
            "run_id": run_id,
            "url": endpoint.url,
            "base_url": endpoint.base_url,
            "model": endpoint.model,
            "context_tokens": endpoint.context_tokens,
            "output_tokens": endpoint.output_tokens,
            "tools": endpoint.tools,
            "reasoning": endpoint.reasoning,
            "key_command": None if endpoint.key is None else list(endpoint.key.command),
            "environment": {
                name: value if isinstance(value, str) else None
                for name, value in self.environment.items()
            },
            "unset": list(self.unset),
            "files": [
                {"path": str(each.path), "format": each.format, "settings": each.data}
                for each in self.files
            ],
            "start": self.start,
            "start_written": self.start_written,
            "notes": list(self.notes),
        }


def describe(agent: Agent, endpoint: Endpoint, shell: Shell) -> Description:
    """Return the settings of an agent without the key."""
    if endpoint.key is not None:
        endpoint = replace(endpoint, key=replace(endpoint.key, value=HIDDEN_KEY))
    settings = agent.settings(endpoint)
    return Description(
        agent=agent,
        endpoint=endpoint,
        exports=tuple(lines(settings.environment, settings.unset, endpoint, shell)),
        files=tuple(
            FileText(
                each.path,
                each.format,
                file_text(each),
                apply_patch(None, settled(each.patch, None)),
            )
            for each in settings.files
        ),
        exports_written=tuple(lines(settings.after_write, (), endpoint, shell)),
        start=command_line(settings.start, shell) if settings.start else "",
        start_written=command_line(settings.start_written, shell) if settings.start_written else "",
        environment=settings.environment,
        unset=settings.unset,
        notes=(*settings.notes, *_advice(agent, endpoint)),
    )


_AGENT_TOKENS = 32_768
"""Context below which the first request of most agents hardly fits."""


def _advice(agent: Agent, endpoint: Endpoint) -> list[str]:
    found = []
    if not endpoint.tools and agent.name != "aider":  # the only one that sends no tools
        found.append(
            "the model's chat template knows no tools, so requests with tools are refused: of the "
            "agents only aider works with it"
        )
    if agent.name == "env":
        return found  # a program with an SDK sends prompts of any length
    if endpoint.context_tokens is not None and endpoint.context_tokens < _AGENT_TOKENS:
        found.append(
            f"the context has {endpoint.context_tokens:,} tokens; the first request of most agents "
            "has 13,000 to 30,000: k2 launch MODEL --context 65536"
        )
    return found
