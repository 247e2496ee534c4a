"""Nodes: the machines of a cluster, as the launcher uses them.

``LocalNode`` is this machine, ``SshNode`` one that OpenSSH reaches without a password. Both answer
the same questions through ``cluster.agent``; the launcher does not know which is which.
"""

from __future__ import annotations

import asyncio
import os
import shlex
import socket
import subprocess
import sys
import sysconfig
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import msgspec

import k2cli
from k2cli.cluster import agent
from k2cli.cluster.agent import NodeFacts, RunProcess
from k2cli.errors import ClusterError

LOCALHOST = "localhost"
_LOCAL_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})
_CALL_SECONDS = 20.0
# One line of a guard may carry the last lines of a rank.
_STREAM_LIMIT_BYTES = 4 * 2**20
_SSH_FAILED = 255
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Completed:
    """A finished command."""

    status: int
    stdout: bytes
    stderr: bytes


class Node(Protocol):
    """One machine. What cannot be done raises ``ClusterError`` naming the node."""

    @property
    def name(self) -> str:
        """As the user wrote it; every name of this machine is ``localhost``."""
        ...

    @property
    def is_local(self) -> bool:
        """Whether it is the machine that launches."""
        ...

    def run(
        self,
        arguments: Sequence[str],
        input: bytes | None = None,
        timeout_seconds: float = _CALL_SECONDS,
    ) -> Completed:
        """Run a command to its end, within the time limit."""
        ...

    async def start(
        self, arguments: Sequence[str], environment: Mapping[str, str] | None = None
    ) -> asyncio.subprocess.Process:
        """Start a command in a session of its own, with pipes for stdin, stdout and stderr."""
        ...

    def address(self) -> str:
        """Where other nodes reach this one."""
        ...

    def facts(self) -> NodeFacts:
        """Versions and paths there."""
        ...

    def memory(self) -> Any:
        """Its ``planning.hardware.NodeMemory``."""
        ...

    def write_file(self, run_id: str, name: str, data: bytes) -> None:
        """Write a file into the run's folder there, readable by its owner only."""
        ...

    def remove_bootstraps(self, run_id: str) -> None:
        """Remove what guards that never started have left unread."""
        ...

    def free_ports(self, count: int) -> list[int]:
        """Ports that nothing listens on there."""
        ...

    def port_holder(self, host: str, port: int) -> str | None:
        """None if that port is free there, else who holds it."""
        ...

    def choose_port(self, host: str, first: int) -> int:
        """The first free port there from ``first`` on."""
        ...

    def processes_of_run(self, run_id: str) -> list[RunProcess]:
        """Processes of a run that live there."""
        ...

    def kill_run(self, run_id: str) -> list[RunProcess]:
        """SIGKILL them all; returns what is left."""
        ...


def python_environment() -> dict[str, str]:
    """This process's environment, with which a Python in any folder finds this very k2cli."""
    environment = dict(os.environ)
    given = environment.get("PYTHONPATH", "").split(os.pathsep)
    paths = [str(Path(path).resolve()) for path in given if path]
    root = str(Path(k2cli.__file__).resolve().parent.parent)
    installed = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    if root not in paths and root not in installed:
        paths.insert(0, root)
    if paths:
        environment["PYTHONPATH"] = os.pathsep.join(paths)
    return environment


async def _start(
    arguments: Sequence[str], environment: Mapping[str, str] | None, folder: Path | None, what: str
) -> asyncio.subprocess.Process:
    try:
        return await asyncio.create_subprocess_exec(
            *arguments,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env=environment,
            cwd=folder,
            limit=_STREAM_LIMIT_BYTES,
            # Ctrl-C in the launcher's terminal is the launcher's alone.
            start_new_session=True,
        )
    except OSError as error:
        raise ClusterError(f"{what} cannot be started: {error}") from error


def _run(
    arguments: Sequence[str], input: bytes | None, timeout_seconds: float, node: str
) -> Completed:
    try:
        done = subprocess.run(
            list(arguments),
            input=input if input is not None else b"",
            capture_output=True,
            timeout=timeout_seconds,
        )
    except subprocess.TimeoutExpired:
        raise ClusterError(f"node {node} did not answer within {timeout_seconds:.0f} s") from None
    except OSError as error:
        raise ClusterError(f"{arguments[0]} does not run on {node}: {error}") from error
    return Completed(done.returncode, done.stdout, done.stderr)


class LocalNode:
    """This machine."""

    name = LOCALHOST
    is_local = True

    def run(
        self,
        arguments: Sequence[str],
        input: bytes | None = None,
        timeout_seconds: float = _CALL_SECONDS,
    ) -> Completed:
        """Run a command to its end."""
        return _run(arguments, input, timeout_seconds, self.name)

    async def start(
        self, arguments: Sequence[str], environment: Mapping[str, str] | None = None
    ) -> asyncio.subprocess.Process:
        """Start a command; ``environment`` is added to that of k2."""
        whole = {**python_environment(), **(environment or {})}
        return await _start(arguments, whole, Path("/"), arguments[0])

    def address(self) -> str:
        """The loopback address: right only while every node is this machine."""
        return "127.0.0.1"

    def facts(self) -> NodeFacts:
        """Of this process."""
        return agent.facts()

    def memory(self) -> Any:
        """As MLX sees it."""
        from k2cli.planning.hardware import this_machine

        return this_machine(self.name)

    def write_file(self, run_id: str, name: str, data: bytes) -> None:
        """Into the run's folder."""
        try:
            agent.write_private(run_id, name, data)
        except OSError as error:
            raise ClusterError(f"the run's folder cannot be written: {error}") from error

    def remove_bootstraps(self, run_id: str) -> None:
        """What guards have not read."""
        agent.remove_bootstraps(run_id)

    def free_ports(self, count: int) -> list[int]:
        """Of all addresses."""
        return agent.free_ports(count)

    def port_holder(self, host: str, port: int) -> str | None:
        """Named where the system lets us see it."""
        return agent.port_holder(host, port)

    def choose_port(self, host: str, first: int) -> int:
        """On that address."""
        try:
            return agent.choose_port(host, first)
        except OSError as error:
            raise ClusterError(
                f"'{host}' is no address of this machine: {error.strerror}", "--host 127.0.0.1"
            ) from error

    def processes_of_run(self, run_id: str) -> list[RunProcess]:
        """By their command lines."""
        return agent.processes_of_run(run_id)

    def kill_run(self, run_id: str) -> list[RunProcess]:
        """And wait until they are gone."""
        return agent.kill_run(run_id)


class SshNode:
    """A machine that ``ssh NAME`` reaches without asking anything.

    It needs the same k2 under the same path of Python.
    """

    is_local = False

    def __init__(self, name: str, python: str = sys.executable) -> None:
        self.name = name
        self._python = python

    def _ssh(self, arguments: Sequence[str]) -> list[str]:
        options = {
            "BatchMode": "yes",
            "ConnectTimeout": "10",
            "ServerAliveInterval": "3",
            "ServerAliveCountMax": "3",
        }
        given = [part for name, value in options.items() for part in ("-o", f"{name}={value}")]
        # ssh hands one string to the remote shell: only here is anything quoted.
        return ["ssh", *given, "-T", "--", self.name, shlex.join(arguments)]

    def run(
        self,
        arguments: Sequence[str],
        input: bytes | None = None,
        timeout_seconds: float = _CALL_SECONDS,
    ) -> Completed:
        """Run a command there to its end."""
        done = _run(self._ssh(arguments), input, timeout_seconds, self.name)
        if done.status == _SSH_FAILED:
            reason = done.stderr.decode(errors="replace").strip().splitlines()
            raise ClusterError(
                f"node {self.name} cannot be reached: {reason[-1] if reason else 'ssh failed'}",
                f"ssh {self.name} true",
            )
        return done

    async def start(
        self, arguments: Sequence[str], environment: Mapping[str, str] | None = None
    ) -> asyncio.subprocess.Process:
        """Start a command there; ``environment`` must hold no secret."""
        settings = [f"{name}={value}" for name, value in (environment or {}).items()]
        remote = ["env", *settings, *arguments] if settings else list(arguments)
        return await _start(self._ssh(remote), None, None, "ssh")

    def address(self) -> str:
        """The host name that ssh's configuration gives for this name, as an IP address."""
        done = _run(["ssh", "-G", "--", self.name], None, _CALL_SECONDS, self.name)
        fields = dict(
            line.split(" ", 1) for line in done.stdout.decode().splitlines() if " " in line
        )
        host = fields.get("hostname", self.name)
        try:
            return str(socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][4][0])
        except OSError as error:
            raise ClusterError(f"node {self.name}: unknown host {host} ({error})") from error

    def _ask(self, kind: type[T] | Any, *verb: str, input: bytes | None = None) -> T:
        command = [self._python, "-P", "-m", "k2cli.cluster.agent", *verb]
        done = self.run(command, input)
        if done.status != 0:
            reason = done.stderr.decode(errors="replace").strip().splitlines()
            raise ClusterError(
                f"node {self.name} could not do '{verb[0]}': {reason[-1] if reason else 'failed'}",
                f"is the same k2 installed there under {self._python}?",
            )
        try:
            answer: T = msgspec.json.decode(done.stdout, type=kind)
        except msgspec.MsgspecError as error:
            raise ClusterError(f"node {self.name} gave no sense to '{verb[0]}': {error}") from error
        return answer

    def facts(self) -> NodeFacts:
        """Versions and paths there."""
        return self._ask(NodeFacts, "facts")

    def memory(self) -> Any:
        """As MLX sees it there, under this node's name."""
        from dataclasses import replace

        from k2cli.planning.hardware import NodeMemory

        found: NodeMemory = self._ask(NodeMemory, "memory")
        return replace(found, name=self.name)

    def write_file(self, run_id: str, name: str, data: bytes) -> None:
        """Through ssh's stdin, so that no secret is on a command line."""
        self._ask(None, "write", run_id, name, input=data)

    def remove_bootstraps(self, run_id: str) -> None:
        """What guards have not read."""
        self._ask(None, "remove-bootstraps", run_id)

    def free_ports(self, count: int) -> list[int]:
        """Of all addresses there."""
        return self._ask(list[int], "free-ports", str(count))

    def port_holder(self, host: str, port: int) -> str | None:
        """Named where that system lets its user see it."""
        return self._ask(str | None, "port-holder", host, str(port))

    def choose_port(self, host: str, first: int) -> int:
        """On that address there."""
        return self._ask(int, "choose-port", host, str(first))

    def processes_of_run(self, run_id: str) -> list[RunProcess]:
        """By their command lines there."""
        return self._ask(list[RunProcess], "processes", run_id)

    def kill_run(self, run_id: str) -> list[RunProcess]:
        """And wait until they are gone there."""
        return self._ask(list[RunProcess], "kill", run_id)


def node_named(name: str) -> Node:
    """The node that a user's name stands for."""
    if name.lower() in _LOCAL_NAMES or name == socket.gethostname():
        return LocalNode()
    return SshNode(name)


def addresses(nodes: Sequence[Node]) -> list[str]:
    """Where each node is reached by the others, in the order given.

    Raises:
        ClusterError: if a name cannot be resolved.
    """
    remote = next((node for node in nodes if not node.is_local), None)
    if remote is None:
        return [node.address() for node in nodes]
    there = remote.address()
    try:
        here = agent.address_towards(there)
    except OSError as error:
        raise ClusterError(f"there is no route to node {remote.name}: {error}") from error
    return [here if node.is_local else node.address() for node in nodes]
