"""Settings that an adapter makes of an endpoint: environment, files, arguments and advice."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Final, Literal

from k2cli.connect.config_file import ConfigChange, Format
from k2cli.connect.endpoint import PLACEHOLDER_KEY, Endpoint
from k2cli.connect.formats.patch import Patch


class _KeyValue:
    """Stands for the key in an environment."""

    def __repr__(self) -> str:
        return "KEY"


KEY: Final = _KeyValue()
"""Stands in place of a value of the environment: the key of the run."""

Value = str | _KeyValue


@dataclass(frozen=True, slots=True)
class TemporaryFile:
    """A file that exists while k2 runs the agent, for what no variable can say.

    Its path is the value of a variable, or of an option of the agent's program.
    """

    name: str
    format: Format
    patch: Patch
    variable: str = ""
    option: str = ""


@dataclass(frozen=True, slots=True)
class Settings:
    """All that points one agent at one run.

    Attributes:
        environment: variables for a shell, and for a command that k2 runs.
        unset: variables that would send a key elsewhere, or requests to another server.
        files: changes of configuration files, for ``--write``.
        after_write: variables that a configured agent still needs.
        start: the command that starts the agent in this environment.
        start_written: the command that starts it once its files are written.
        arguments: what k2 puts after the program's name when it runs the agent.
        temporary: files for the time that k2 runs the agent.
        notes: what the user should know.
    """

    environment: Mapping[str, Value]
    start: tuple[str, ...] = ()
    start_written: tuple[str, ...] = ()
    unset: tuple[str, ...] = ()
    files: tuple[ConfigChange, ...] = ()
    after_write: Mapping[str, Value] = field(default_factory=dict)
    arguments: tuple[str, ...] = ()
    temporary: tuple[TemporaryFile, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Agent:
    """An agent that k2 knows.

    Attributes:
        name: what the user types.
        title: its own name.
        program: the name of its program, empty if it has none.
        install: the command that installs it.
        settings: makes the settings for an endpoint.
        set_by: what a user sets by hand, if k2 does not.
        environment_suffices: False if the agent takes its server from a file alone.
    """

    name: str
    title: str
    program: str
    install: str
    settings: Callable[[Endpoint], Settings]
    set_by: Literal["environment", "files"]
    environment_suffices: bool = True


def key_value(endpoint: Endpoint) -> Value:
    """Return the value of a variable for the key: the key, or a placeholder if there is none."""
    return PLACEHOLDER_KEY if endpoint.key is None else KEY


def resolved(environment: Mapping[str, Value], endpoint: Endpoint) -> dict[str, str]:
    """Return an environment with the key itself in it."""
    key = PLACEHOLDER_KEY if endpoint.key is None else endpoint.key.value
    return {name: value if isinstance(value, str) else key for name, value in environment.items()}


def authority_environment(endpoint: Endpoint, *names: str) -> dict[str, str]:
    """Return the variables that name the certificate to trust, none if there is none to name."""
    if endpoint.authority is None:
        return {}
    return dict.fromkeys(names, str(endpoint.authority))
