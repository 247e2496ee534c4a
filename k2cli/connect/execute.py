"""Running an agent with the environment of a run, in place of k2's own process."""

from __future__ import annotations

import os
import shutil
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NoReturn
from urllib.parse import urlsplit

from k2cli.connect.endpoint import Endpoint
from k2cli.connect.settings import AUTHORITY_VARIABLES, Agent, Settings, resolved
from k2cli.errors import K2Error

_LOOPBACK = ("127.0.0.1", "localhost", "::1")


def command_with_arguments(agent: Agent, settings: Settings, command: Sequence[str]) -> list[str]:
    """Return a command with the adapter's arguments after it, if it is the agent's program."""
    program = Path(command[0]).name
    added = settings.arguments if agent.program and program == agent.program else ()
    return [command[0], *added, *command[1:]]


def environment_with(
    settings: Settings, endpoint: Endpoint, inherited: Mapping[str, str]
) -> dict[str, str]:
    """Return the environment for an agent, with the key in it.

    A proxy is not asked for this machine's own ports. Authorities that the user has set stay.
    """
    environment = {name: value for name, value in inherited.items() if name not in settings.unset}
    for name, value in resolved(settings.environment, endpoint).items():
        if not (name in AUTHORITY_VARIABLES and environment.get(name)):
            environment[name] = value
    if urlsplit(endpoint.url).hostname in _LOOPBACK and _has_proxy(environment):
        for name in ("NO_PROXY", "no_proxy"):
            before = environment.get(name) or ""
            environment[name] = ",".join([*filter(None, [before]), *_LOOPBACK])
    return environment


def _has_proxy(environment: Mapping[str, str]) -> bool:
    return any(
        value and name.lower() in ("http_proxy", "https_proxy", "all_proxy")
        for name, value in environment.items()
    )


def replace_process(
    agent: Agent, command: Sequence[str], environment: Mapping[str, str]
) -> NoReturn:
    """Become the command: its signals, terminal and exit status are this process's.

    Raises:
        K2Error: if there is no such program, or it cannot be started.
    """
    path = shutil.which(command[0], path=environment.get("PATH"))
    if path is None:
        ours = agent.program and Path(command[0]).name == agent.program
        raise K2Error(
            f"'{command[0]}' is not installed, or not in PATH",
            agent.install if ours else "write the path of the program after --",
        )
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    # Python ignores these, and what is ignored stays so in the program.
    for name in ("SIGPIPE", "SIGXFSZ"):
        signal.signal(getattr(signal, name), signal.SIG_DFL)
    try:
        os.execve(path, list(command), dict(environment))
    except OSError as error:
        raise K2Error(f"'{command[0]}' cannot be started: {error.strerror or error}") from error
