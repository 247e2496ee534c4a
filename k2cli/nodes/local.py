"""This machine as a node: the agent's verbs are called in this process."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from k2cli.agent import facts as node_facts
from k2cli.agent import main as agent_main
from k2cli.agent import ports, run_folder, run_processes
from k2cli.agent.facts import NodeFacts
from k2cli.agent.gpus import machine_with_runs
from k2cli.agent.run_processes import RunProcess
from k2cli.errors import ClusterError
from k2cli.files import DISK_ERRORS, unwritable
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

    def ask(
        self,
        kind: type[T] | Any,
        verb: str,
        *arguments: str,
        input: bytes | None = None,
        timeout_seconds: float = CALL_SECONDS,
    ) -> T:
        """Call a verb of the agent in this process, through the same JSON as on other nodes."""
        try:
            encoded = agent_main.answer(verb, arguments, input or b"")
        except OSError as error:
            if error.errno in DISK_ERRORS and error.filename:
                raise unwritable(error, Path(os.fsdecode(error.filename)), ClusterError) from error
            raise ClusterError(f"'{verb}' failed on this machine: {error}") from error
        result: T = decode_answer(self.name, verb, encoded, kind)
        return result

    def run(
        self,
        arguments: Sequence[str],
        input: bytes | None = None,
        timeout_seconds: float = CALL_SECONDS,
    ) -> Completed:
        return run_process(arguments, input, timeout_seconds, self.name)

    def reach(self, seconds: float) -> None:
        """Return at once: this machine is always reachable."""

    async def start(
        self, arguments: Sequence[str], environment: Mapping[str, str] | None = None
    ) -> asyncio.subprocess.Process:
        """Start a command; ``environment`` is added to k2's own."""
        whole = {**python_environment(), **(environment or {})}
        return await start_process(arguments, whole, Path("/"), arguments[0])

    def address(self) -> str:
        """Return the loopback address, which is valid if every node is this machine."""
        return "127.0.0.1"

    def facts(self) -> NodeFacts:
        return node_facts.facts()

    def memory(self) -> Any:
        return machine_with_runs()

    def write_file(self, run_id: str, name: str, data: bytes) -> None:
        try:
            run_folder.write_private(run_id, name, data)
        except OSError as error:
            path = run_folder.run_folder(run_id) / name
            raise unwritable(error, path, ClusterError) from error

    def remove_bootstraps(self, run_id: str) -> None:
        self.ask(None, "remove-bootstraps", run_id)

    def free_ports(self, count: int) -> list[int]:
        return ports.free_ports(count)

    def port_holder(self, host: str, port: int) -> str | None:
        return ports.port_holder(host, port)

    def choose_port(self, host: str, first: int) -> int:
        try:
            return ports.choose_port(host, first)
        except OSError as error:
            raise ClusterError(
                f"'{host}' is no address of this machine: {error.strerror}", "--host 127.0.0.1"
            ) from error

    def processes_of_run(self, run_id: str) -> list[RunProcess]:
        return run_processes.processes_of_run(run_id)

    def kill_run(self, run_id: str) -> list[RunProcess]:
        return run_processes.kill_run(run_id)
