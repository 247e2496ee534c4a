"""The interface of a machine, and functions that its two implementations share.

``local.LocalNode`` is this machine, ``ssh.SshNode`` a machine that OpenSSH reaches. Both answer
through the agent's verbs (``agent.main``).
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sysconfig
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Protocol, TypeVar

import msgspec

import k2cli
from k2cli.agent import ports
from k2cli.agent.facts import NodeFacts
from k2cli.agent.run_processes import RunProcess
from k2cli.errors import ClusterError
from k2cli.files import decode_json
from k2cli.pauses import Deadline
from k2cli.system.bonjour import bonjour_name

if TYPE_CHECKING:
    import asyncio

LOCALHOST = "localhost"
_LOCAL_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})
CALL_SECONDS = 20.0
# Time limit of a test whether a node can be reached. A new connection takes about half a second in
# a local network, and twice that over a jump host.
REACH_SECONDS = 4.0
# One line of a guard may carry the last lines of a rank.
_STREAM_LIMIT_BYTES = 4 * 2**20
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Completed:
    """A finished command."""

    status: int
    stdout: bytes
    stderr: bytes


class Node(Protocol):
    """One machine. Every method may raise a ``ClusterError`` that names the node."""

    @property
    def name(self) -> str:
        """Name as the user wrote it; every name of this machine is ``localhost``."""
        ...

    @property
    def is_local(self) -> bool:
        """True for the machine that k2 runs on."""
        ...

    def run(
        self,
        arguments: Sequence[str],
        input: bytes | None = None,
        timeout_seconds: float = CALL_SECONDS,
    ) -> Completed:
        """Run a command to its end, within the time limit."""
        ...

    def reach(self, seconds: float) -> None:
        """Verify within a time limit that commands reach the node and answers come back."""
        ...

    async def start(
        self, arguments: Sequence[str], environment: Mapping[str, str] | None = None
    ) -> asyncio.subprocess.Process:
        """Start a command in a session of its own, with pipes for stdin, stdout and stderr."""
        ...

    @property
    def python(self) -> str:
        """Interpreter that runs k2 there: guards, ranks and the agent."""
        ...

    def ask(
        self,
        kind: type[T] | Any,
        verb: str,
        *arguments: str,
        input: bytes | None = None,
        timeout_seconds: float = CALL_SECONDS,
    ) -> T:
        """Call a verb of the agent there and decode its answer as a ``kind``."""
        ...

    def address(self) -> str:
        """Return the address at which other nodes reach this one."""
        ...

    def facts(self) -> NodeFacts:
        """Return the versions and paths there."""
        ...

    def memory(self) -> Any:
        """Return its ``planning.hardware.machine.NodeMemory``."""
        ...

    def write_file(self, run_id: str, name: str, data: bytes) -> None:
        """Write a file into the run's folder there, readable by its owner only."""
        ...

    def remove_bootstraps(self, run_id: str) -> None:
        """Remove bootstrap files that no guard has read."""
        ...

    def free_ports(self, count: int) -> list[int]:
        """Find ports that no process listens on there."""
        ...

    def port_holder(self, host: str, port: int) -> str | None:
        """Return None if that port is free there, else the process that holds it."""
        ...

    def choose_port(self, host: str, first: int) -> int:
        """Find the first free port there from ``first`` on."""
        ...

    def processes_of_run(self, run_id: str) -> list[RunProcess]:
        """Find the processes of a run there."""
        ...

    def kill_run(self, run_id: str) -> list[RunProcess]:
        """Kill all processes of a run and wait until they have ended; returns those left."""
        ...


def python_environment() -> dict[str, str]:
    """Return this process's environment, extended so that a Python in any folder finds k2cli."""
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


async def start_process(
    arguments: Sequence[str], environment: Mapping[str, str] | None, folder: Path | None, what: str
) -> asyncio.subprocess.Process:
    """Start a process in a session of its own, with pipes; ``what`` names it in errors."""
    import asyncio  # only supervisors need it; commands start faster

    try:
        return await asyncio.create_subprocess_exec(
            *arguments,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env=environment,
            cwd=folder,
            limit=_STREAM_LIMIT_BYTES,
            # Ctrl-C in the terminal must reach the launcher only.
            start_new_session=True,
        )
    except OSError as error:
        raise ClusterError(f"{what} cannot be started: {error}") from error


def run_process(
    arguments: Sequence[str], input: bytes | None, timeout_seconds: float, node: str
) -> Completed:
    """Run a process of this machine to its end; ``node`` is named in errors."""
    pipe = subprocess.PIPE
    try:
        with subprocess.Popen(list(arguments), stdin=pipe, stdout=pipe, stderr=pipe) as process:
            try:
                stdout, stderr = communicate(process, input, Deadline(timeout_seconds))
            except BaseException:
                process.kill()
                raise
    except subprocess.TimeoutExpired:
        raise ClusterError(f"node {node} did not answer within {timeout_seconds:.0f} s") from None
    except OSError as error:
        raise ClusterError(f"{arguments[0]} does not run on {node}: {error}") from error
    return Completed(process.returncode, stdout, stderr)


def communicate(
    process: subprocess.Popen[bytes], input: bytes | None, limit: Deadline
) -> tuple[bytes, bytes]:
    """Send input to a process, and return its output once it has ended.

    The time in which this process itself was stopped, by Ctrl-Z for example, does not count.

    Raises:
        subprocess.TimeoutExpired: if it takes longer. The process is not ended.
    """
    # ``communicate`` can be called again after a time limit, but then it sends no more input.
    stdin, process.stdin = process.stdin, None
    assert stdin is not None
    threading.Thread(target=_feed, args=(stdin, input or b""), daemon=True).start()
    while True:
        try:
            return process.communicate(timeout=limit.next_wait())
        except subprocess.TimeoutExpired:
            if limit.has_passed:
                raise


def _feed(stdin: IO[bytes], data: bytes) -> None:
    """Write all input of a process, or as much as it takes before it ends."""
    with contextlib.suppress(OSError):
        stdin.write(data)
    with contextlib.suppress(OSError):
        stdin.close()


def decode_answer(node: str, verb: str, answer: bytes, kind: Any) -> Any:
    """Decode the agent's answer.

    Raises:
        ClusterError: if it is not a ``kind``.
    """
    try:
        return decode_json(answer, type=kind)
    except msgspec.MsgspecError as error:
        raise ClusterError(
            f"node {node} returned an unreadable answer to '{verb}': {error}"
        ) from error


def is_this_machine(name: str) -> bool:
    """True if a name that the user gave means the machine that k2 runs on."""
    own, given = socket.gethostname().lower(), name.lower()
    # A Mac's host name is Name.local, unless the network has another; users write Name.
    if given in _LOCAL_NAMES | {own, own.removesuffix(".local")}:
        return True
    bare = given.removesuffix(".local")
    return bare != "" and bare == bonjour_name()


def addresses(nodes: Sequence[Node]) -> list[str]:
    """Return the address at which the others reach each node, in the order given.

    Raises:
        ClusterError: if a name cannot be resolved.
    """
    remote = next((node for node in nodes if not node.is_local), None)
    if remote is None:
        return [node.address() for node in nodes]
    there = remote.address()
    try:
        here = ports.address_towards(there)
    except OSError as error:
        raise ClusterError(f"there is no route to node {remote.name}: {error}") from error
    return [here if node.is_local else node.address() for node in nodes]
