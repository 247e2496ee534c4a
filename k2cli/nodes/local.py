"""This machine as a node: verbs of the agent are answered in this process."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from k2cli.agent import facts as node_facts
from k2cli.agent import main as agent_main
from k2cli.agent import ports, run_folder, run_processes
from k2cli.agent.facts import NodeFacts
from k2cli.agent.run_processes import RunProcess
from k2cli.errors import ClusterError
from k2cli.nodes.node import (
    CALL_SECONDS,
    LOCALHOST,
    Completed,
    decode_answer,
    python_environment,
    run_process,
    start_process,
)

if TYPE_CHECKING:
    import asyncio

T = TypeVar("T")


class LocalNode:
    """This machine."""

    name = LOCALHOST
    is_local = True
    python = sys.executable

    def ask(self, kind: type[T] | Any, verb: str, *arguments: str, input: bytes | None = None) -> T:
        """In this process, through the same JSON as elsewhere."""
        try:
            encoded = agent_main.answer(verb, arguments, input or b"")
        except OSError as error:
            raise ClusterError(f"this machine could not do '{verb}': {error}") from error
        result: T = decode_answer(self.name, verb, encoded, kind)
        return result

    def run(
        self,
        arguments: Sequence[str],
        input: bytes | None = None,
        timeout_seconds: float = CALL_SECONDS,
    ) -> Completed:
        """Run a command to its end."""
        return run_process(arguments, input, timeout_seconds, self.name)

    def reach(self, seconds: float) -> None:
        """Here we are."""

    async def start(
        self, arguments: Sequence[str], environment: Mapping[str, str] | None = None
    ) -> asyncio.subprocess.Process:
        """Start a command; ``environment`` is added to that of k2."""
        whole = {**python_environment(), **(environment or {})}
        return await start_process(arguments, whole, Path("/"), arguments[0])

    def address(self) -> str:
        """The loopback address: right only while every node is this machine."""
        return "127.0.0.1"

    def facts(self) -> NodeFacts:
        """Of this process."""
        return node_facts.facts()

    def memory(self) -> Any:
        """As MLX sees it."""
        from k2cli.planning.hardware.machine import this_machine

        return this_machine(self.name)

    def write_file(self, run_id: str, name: str, data: bytes) -> None:
        """Into the run's folder."""
        try:
            run_folder.write_private(run_id, name, data)
        except OSError as error:
            raise ClusterError(f"the run's folder cannot be written: {error}") from error

    def remove_bootstraps(self, run_id: str) -> None:
        """What guards have not read."""
        run_folder.remove_bootstraps(run_id)

    def free_ports(self, count: int) -> list[int]:
        """Of all addresses."""
        return ports.free_ports(count)

    def port_holder(self, host: str, port: int) -> str | None:
        """Named where the system lets us see it."""
        return ports.port_holder(host, port)

    def choose_port(self, host: str, first: int) -> int:
        """On that address."""
        try:
            return ports.choose_port(host, first)
        except OSError as error:
            raise ClusterError(
                f"'{host}' is no address of this machine: {error.strerror}", "--host 127.0.0.1"
            ) from error

    def processes_of_run(self, run_id: str) -> list[RunProcess]:
        """By their command lines."""
        return run_processes.processes_of_run(run_id)

    def kill_run(self, run_id: str) -> list[RunProcess]:
        """And wait until they are gone."""
        return run_processes.kill_run(run_id)
