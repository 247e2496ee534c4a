"""A node that OpenSSH reaches without asking for a password."""

from __future__ import annotations

import functools
import socket
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

from k2cli import __version__
from k2cli.agent.facts import UNKNOWN_VERB_STATUS, NodeFacts
from k2cli.agent.run_processes import RunProcess
from k2cli.errors import ClusterError, UsageError
from k2cli.nodes.interpreter import find_interpreter, last_line
from k2cli.nodes.node import CALL_SECONDS, Completed, decode_answer, start_process
from k2cli.nodes.node_name import is_node_name
from k2cli.nodes.ssh_connection import connection_to
from k2cli.planning.hardware.machine import NodeMemory

if TYPE_CHECKING:
    import asyncio

T = TypeVar("T")
# Exit statuses of a shell and env if a program does not exist or cannot be run.
_NOT_RUN = (126, 127)
_FULL_DISK_ACCESS = (
    "a Mac keeps what ssh starts from external disks, Documents, Desktop and Downloads until this "
    "is on: System Settings, General, Sharing, Remote Login, Allow full disk access"
)


class SshNode:
    """A machine that ``ssh NAME`` reaches without asking for a password.

    Args:
        name: a Host of ssh's configuration, a host name, or ``user@host``.
        python: the interpreter that runs k2 there; searched for if not given or no longer there.
        address: where other nodes reach it; by default the host name in ssh's configuration.
        recorded_python: the interpreter that ran k2 there before, which is tried first.

    Raises:
        UsageError: if the name is empty, begins with ``-``, or holds a space or a comma.
    """

    is_local = False

    def __init__(
        self,
        name: str,
        python: str | None = None,
        address: str | None = None,
        recorded_python: str | None = None,
    ) -> None:
        if not is_node_name(name):
            raise UsageError(f"'{name}' cannot be the name of a node", "names for ssh: a,b")
        self.name = name
        self._python = python
        self._address = address
        self._recorded_python = recorded_python

    @property
    def python(self) -> str:
        """Interpreter that runs k2 there.

        Raises:
            ClusterError: if this version of k2 is not installed there.
        """
        if self._python is None:
            found = find_interpreter(self.name, self.run, self._recorded_python)
            self._python = found.executable
        return self._python

    def run(
        self,
        arguments: Sequence[str],
        input: bytes | None = None,
        timeout_seconds: float = CALL_SECONDS,
    ) -> Completed:
        """Run a command there to its end, in the home folder."""
        return connection_to(self.name).run(arguments, input, timeout_seconds)

    def reach(self, seconds: float) -> None:
        connection_to(self.name).reach(seconds)

    async def start(
        self, arguments: Sequence[str], environment: Mapping[str, str] | None = None
    ) -> asyncio.subprocess.Process:
        """Start a command there over its own connection; ``environment`` must hold no secret."""
        import asyncio  # only supervisors need it; commands start faster

        settings = [f"{name}={value}" for name, value in (environment or {}).items()]
        remote = ["env", *settings, *arguments] if settings else list(arguments)
        # A start-up file may print something without a line's end, which would spoil the first one.
        remote = ["sh", "-c", 'echo; exec "$@"', "sh", *remote]
        command = await asyncio.to_thread(connection_to(self.name).command, remote)
        return await start_process(command, None, None, "ssh")

    def address(self) -> str:
        """Return the given address, or else that of the host name in ssh's configuration."""
        if self._address is None:
            host = connection_to(self.name).configuration.get("hostname", self.name)
            self._address = _resolved(self.name, host)
        return self._address

    def ask(
        self,
        kind: type[T] | Any,
        verb: str,
        *arguments: str,
        input: bytes | None = None,
        timeout_seconds: float = CALL_SECONDS,
    ) -> T:
        done = self._run_agent(verb, arguments, input, timeout_seconds)
        if done.status in _NOT_RUN:  # the environment has been moved or removed
            self._python = None
            done = self._run_agent(verb, arguments, input, timeout_seconds)
        if done.status != 0:
            raise self._agent_error(verb, done)
        result: T = decode_answer(self.name, verb, last_line(done.stdout), kind)
        return result

    def _run_agent(
        self, verb: str, arguments: Sequence[str], input: bytes | None, seconds: float
    ) -> Completed:
        command = [self.python, "-P", "-m", "k2cli.agent.main", verb, *arguments]
        return self.run(command, input, seconds)

    def _agent_error(self, verb: str, done: Completed) -> ClusterError:
        reason = done.stderr.decode(errors="replace").strip()
        prepare = f"k2 cluster prepare --nodes {self.name}"
        if done.status == UNKNOWN_VERB_STATUS:
            return ClusterError(
                f"node {self.name} has another k2 than this machine's {__version__}", prepare
            )
        if "No module named" in reason and "k2cli" in reason:
            return ClusterError(f"k2 is not installed on node {self.name}", prepare)
        if "No space left on device" in reason:
            return ClusterError(f"the disk of node {self.name} is full", f"ssh {self.name} df -h")
        last = reason.splitlines()[-1] if reason else f"status {done.status}"
        hint = _FULL_DISK_ACCESS if "Operation not permitted" in last else prepare
        return ClusterError(f"'{verb}' failed on node {self.name}: {last}", hint)

    def facts(self) -> NodeFacts:
        return self.ask(NodeFacts, "facts")

    def memory(self) -> Any:
        """Ask for the memory that MLX may use there; it gets this node's name."""
        found: NodeMemory = self.ask(NodeMemory, "memory")
        return replace(found, name=self.name)

    def write_file(self, run_id: str, name: str, data: bytes) -> None:
        """Write a file of a run over ssh's stdin, so that no secret is on a command line."""
        self.ask(None, "write", run_id, name, input=data)

    def remove_bootstraps(self, run_id: str) -> None:
        self.ask(None, "remove-bootstraps", run_id)

    def free_ports(self, count: int) -> list[int]:
        return self.ask(list[int], "free-ports", str(count))

    def port_holder(self, host: str, port: int) -> str | None:
        return self.ask(str | None, "port-holder", host, str(port))

    def choose_port(self, host: str, first: int) -> int:
        return self.ask(int, "choose-port", host, str(first))

    def processes_of_run(self, run_id: str) -> list[RunProcess]:
        return self.ask(list[RunProcess], "processes", run_id)

    def kill_run(self, run_id: str) -> list[RunProcess]:
        return self.ask(list[RunProcess], "kill", run_id)


@functools.cache
def _resolved(node: str, host: str) -> str:
    """Return an address of a host that also means something on other nodes, IPv4 if it has one.

    MLX's ring and JACCL open IPv4 sockets only (``TCPSocket`` and ``parse_address`` of mlx 0.32).
    For a name of Bonjour (``NAME.local``), macOS may give the link-local IPv6 address first
    (mobile-shell/mosh#765). It needs an interface, which has another name on each machine.
    """
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError as error:
        raise ClusterError(f"node {node}: unknown host {host} ({error})") from error
    addresses = [str(address[0]) for *_, address in found]
    return min(addresses, key=lambda each: (":" in each, each.lower().startswith("fe80:")))
