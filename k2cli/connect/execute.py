"""Running an agent with the settings of a run: as this process, or with files that go at its end.

Where variables and options suffice, k2 becomes the agent, so that signals, the terminal and the
exit status are its own. An agent that needs a file is a child, which k2 waits for to remove the
file; it is in the foreground, and k2 passes on the signals that only k2 receives.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import urlsplit

from k2cli.connect.config_file import ConfigChange, file_text
from k2cli.connect.endpoint import Endpoint
from k2cli.connect.settings import Agent, Settings, resolved
from k2cli.errors import K2Error

_LOOPBACK = ("127.0.0.1", "localhost", "::1")
_PASSED_ON = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
_OF_THE_TERMINAL = (signal.SIGINT, signal.SIGQUIT)
"""The terminal sends these to all processes in the foreground, so the child has them already."""


def run_agent(
    agent: Agent,
    settings: Settings,
    endpoint: Endpoint,
    command: Sequence[str],
    inherited: Mapping[str, str],
) -> NoReturn:
    """Run a command with the settings of a run; this process ends as the command does.

    Args:
        command: what the user wrote after ``--``.
        inherited: the environment of this process.

    Raises:
        K2Error: if there is no such program, or it cannot be started.
    """
    environment = environment_with(settings, endpoint, inherited)
    path = _program(agent, command[0], environment)
    is_agent = agent.program != "" and Path(command[0]).name == agent.program
    words = [command[0], *(settings.arguments if is_agent else ()), *command[1:]]
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    if not settings.temporary:
        _become(path, words, environment)
    with tempfile.TemporaryDirectory(prefix="k2-connect-") as folder:
        options = []
        for file in settings.temporary:
            target = Path(folder) / file.name
            target.write_text(file_text(ConfigChange(target, file.format, file.patch)))
            if file.variable:
                environment[file.variable] = str(target)
            elif is_agent:
                options += [file.option, str(target)]
        status = _wait_for(path, [words[0], *options, *words[1:]], environment)
    _end_with(status)


def environment_with(
    settings: Settings, endpoint: Endpoint, inherited: Mapping[str, str]
) -> dict[str, str]:
    """Return the environment for an agent, with the key in it.

    A proxy is not asked for this machine's own ports.
    """
    environment = {name: value for name, value in inherited.items() if name not in settings.unset}
    environment |= resolved(settings.environment, endpoint)
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


def _program(agent: Agent, name: str, environment: Mapping[str, str]) -> str:
    path = shutil.which(name, path=environment.get("PATH"))
    if path is None:
        ours = agent.program and Path(name).name == agent.program
        raise K2Error(
            f"'{name}' is not installed, or not in PATH",
            agent.install if ours else "write the path of the program after --",
        )
    return path


def _cannot_start(name: str, error: OSError) -> K2Error:
    return K2Error(f"'{name}' cannot be started: {error.strerror or error}")


def _become(path: str, words: Sequence[str], environment: Mapping[str, str]) -> NoReturn:
    # Python ignores these, and what is ignored stays so in the program.
    for name in ("SIGPIPE", "SIGXFSZ"):
        signal.signal(getattr(signal, name), signal.SIG_DFL)
    try:
        os.execve(path, list(words), dict(environment))
    except OSError as error:
        raise _cannot_start(words[0], error) from error


def _wait_for(path: str, words: Sequence[str], environment: Mapping[str, str]) -> int:
    """Run a child in the foreground until it ends; return its status as of ``os.waitpid``."""
    child: subprocess.Popen[bytes] | None = None
    early: list[int] = []

    def pass_on(number: int, frame: Any) -> None:
        if number in _OF_THE_TERMINAL and _in_foreground():
            return
        if child is None:
            early.append(number)
        elif child.returncode is None:
            with suppress(ProcessLookupError):  # it has ended just now
                os.kill(child.pid, number)

    # Handlers, unlike ignored signals, are not inherited by the child.
    for each in (*_PASSED_ON, *_OF_THE_TERMINAL):
        signal.signal(each, pass_on)
    try:
        child = subprocess.Popen(list(words), executable=path, env=dict(environment))
    except OSError as error:
        raise _cannot_start(words[0], error) from error
    for number in early:
        with suppress(ProcessLookupError):
            os.kill(child.pid, number)
    while True:
        # The child is not reaped by anything else, so its pid stays its own until here.
        _, status = os.waitpid(child.pid, os.WUNTRACED)
        if not os.WIFSTOPPED(status):
            child.returncode = os.waitstatus_to_exitcode(status)
            return status
        # It has stopped itself (Ctrl-Z): stop too, so that the shell takes over. The shell
        # continues both.
        os.kill(os.getpid(), signal.SIGSTOP)


def _in_foreground() -> bool:
    try:
        with open("/dev/tty", "rb", buffering=0) as terminal:
            return os.tcgetpgrp(terminal.fileno()) == os.getpgrp()
    except OSError:  # there is no terminal
        return False


def _end_with(status: int) -> NoReturn:
    """End this process as a child ended: with its exit status, or by the same signal."""
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        if number not in (signal.SIGKILL, signal.SIGSTOP):
            signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
    sys.exit(os.waitstatus_to_exitcode(status))
