"""A node that OpenSSH reaches without asking anything."""

from __future__ import annotations

import asyncio
import shlex
import socket
import sys
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from k2cli.cluster.agent import NodeFacts, RunProcess
from k2cli.cluster.nodes import (
    CALL_SECONDS,
    Completed,
    decode_answer,
    run_process,
    start_process,
)
from k2cli.errors import ClusterError

_SSH_FAILED = 255
T = TypeVar("T")


class SshNode:
    """A machine that ``ssh NAME`` reaches without asking anything.

    It needs the same k2 under the same path of Python.
    """

    is_local = False

    def __init__(self, name: str, python: str | None = None) -> None:
        self.name = name
        self.python = python or sys.executable

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
        timeout_seconds: float = CALL_SECONDS,
    ) -> Completed:
        """Run a command there to its end."""
        done = run_process(self._ssh(arguments), input, timeout_seconds, self.name)
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
        return await start_process(self._ssh(remote), None, None, "ssh")

    def address(self) -> str:
        """The host name that ssh's configuration gives for this name, as an IP address."""
        done = run_process(["ssh", "-G", "--", self.name], None, CALL_SECONDS, self.name)
        fields = dict(
            line.split(" ", 1) for line in done.stdout.decode().splitlines() if " " in line
        )
        host = fields.get("hostname", self.name)
        try:
            return str(socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][4][0])
        except OSError as error:
            raise ClusterError(f"node {self.name}: unknown host {host} ({error})") from error

    def ask(self, kind: type[T] | Any, verb: str, *arguments: str, input: bytes | None = None) -> T:
        """Through ``python -m k2cli.cluster.agent`` there."""
        command = [self.python, "-P", "-m", "k2cli.cluster.agent", verb, *arguments]
        done = self.run(command, input)
        if done.status != 0:
            reason = done.stderr.decode(errors="replace").strip().splitlines()
            raise ClusterError(
                f"node {self.name} could not do '{verb}': {reason[-1] if reason else 'failed'}",
                f"is the same k2 installed there under {self.python}?",
            )
        result: T = decode_answer(self.name, verb, done.stdout, kind)
        return result

    def facts(self) -> NodeFacts:
        """Versions and paths there."""
        return self.ask(NodeFacts, "facts")

    def memory(self) -> Any:
        """As MLX sees it there, under this node's name."""
        from dataclasses import replace

        from k2cli.planning.hardware import NodeMemory

        found: NodeMemory = self.ask(NodeMemory, "memory")
        return replace(found, name=self.name)

    def write_file(self, run_id: str, name: str, data: bytes) -> None:
        """Through ssh's stdin, so that no secret is on a command line."""
        self.ask(None, "write", run_id, name, input=data)

    def remove_bootstraps(self, run_id: str) -> None:
        """What guards have not read."""
        self.ask(None, "remove-bootstraps", run_id)

    def free_ports(self, count: int) -> list[int]:
        """Of all addresses there."""
        return self.ask(list[int], "free-ports", str(count))

    def port_holder(self, host: str, port: int) -> str | None:
        """Named where that system lets its user see it."""
        return self.ask(str | None, "port-holder", host, str(port))

    def choose_port(self, host: str, first: int) -> int:
        """On that address there."""
        return self.ask(int, "choose-port", host, str(first))

    def processes_of_run(self, run_id: str) -> list[RunProcess]:
        """By their command lines there."""
        return self.ask(list[RunProcess], "processes", run_id)

    def kill_run(self, run_id: str) -> list[RunProcess]:
        """And wait until they are gone there."""
        return self.ask(list[RunProcess], "kill", run_id)
