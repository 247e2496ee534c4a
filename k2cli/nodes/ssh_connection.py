"""Connections to nodes: the system's ``ssh`` with the user's own configuration.

Commands to a node share one connection, so every further command takes only milliseconds. The
connection belongs to this process: its socket has a random name, the process ends it on exit, and
ssh ends it 20 s after its last use if the process was killed. A long-lived command gets its own
connection, so the end of the shared one does not affect it.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import os
import secrets
import shlex
import stat
import subprocess
import tempfile
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from k2cli.errors import ClusterError
from k2cli.nodes.node import CALL_SECONDS, Completed, communicate
from k2cli.nodes.ssh_errors import ssh_error, timed_out
from k2cli.pauses import Deadline

_CONNECT_SECONDS = 10
# A jump host needs two connections, each with a name lookup and a key exchange.
_CONNECT_LIMIT_SECONDS = 25.0
_CONTROL_SECONDS = 2.0
"""Limit of ``ssh -O``, which talks to a process of this machine."""

_LEAST_SECONDS = 0.5
"""What ``reach`` gives its command even if connecting took all of the limit."""

_PERSIST_SECONDS = 20
# sshd allows ten sessions per connection (MaxSessions); two are left for other programs.
_SESSIONS = 8
SSH_FAILED = 255
_MARK = b"k2-output-follows-" + secrets.token_hex(8).encode()
# A Unix socket's path may have 104 bytes on macOS, and ssh appends 17 while it makes the socket.
_LONGEST_SOCKET_PATH = 104 - 1 - 17

_OPTIONS = {
    "BatchMode": "yes",
    "ConnectTimeout": str(_CONNECT_SECONDS),
    "ServerAliveInterval": "3",
    "ServerAliveCountMax": "3",
    "LogLevel": "ERROR",
    # Overrides of settings for interactive use, which would disturb commands.
    "RemoteCommand": "none",
    "RequestTTY": "no",
    "ClearAllForwardings": "yes",
    "PermitLocalCommand": "no",
    "ForwardX11": "no",
}


def marked_command(arguments: Sequence[str]) -> list[str]:
    """Return a command that first prints a line by which its own output can be told.

    A start-up file may print whatever it likes, another text each time, without a line's end.
    """
    return ["sh", "-c", f'echo {_MARK.decode()}; exec "$@"', "sh", *arguments]


class Connection:
    """The shared connection to one node. May be used from several threads."""

    def __init__(self, node: str) -> None:
        self.node = node
        self._lock = threading.Lock()
        self._sessions = threading.BoundedSemaphore(_SESSIONS)
        self._socket: Path | None = None

    @functools.cached_property
    def configuration(self) -> dict[str, str]:
        """ssh's configuration for the node: ``hostname``, ``user``, ``proxyjump``, …"""
        done = _run_ssh(self.node, ["-G", "--", self.node], None, Deadline(CALL_SECONDS))
        lines = done.stdout.decode(errors="replace").splitlines()
        return {key: value for key, _, value in (line.partition(" ") for line in lines)}

    def command(self, arguments: Sequence[str], socket: Path | None = None) -> list[str]:
        """Build the ssh command for ``arguments``; without a socket it has its own connection."""
        return ["ssh", *self._options(socket), "-T", "--", self.node, shlex.join(arguments)]

    def _options(self, socket: Path | None) -> list[str]:
        options = dict(_OPTIONS)
        # "no" would also accept a changed key; users who set it mean "accept-new".
        if self.configuration.get("stricthostkeychecking") in ("no", "off", "false"):
            options["StrictHostKeyChecking"] = "accept-new"
        if socket is None:
            options |= {"ControlMaster": "no", "ControlPath": "none"}
        else:
            persist = {"ControlMaster": "auto", "ControlPersist": str(_PERSIST_SECONDS)}
            options |= persist | {"ControlPath": str(socket)}
        return [part for name, value in options.items() for part in ("-o", f"{name}={value}")]

    def run(self, arguments: Sequence[str], input: bytes | None, seconds: float) -> Completed:
        """Run a command there to its end.

        Raises:
            ClusterError: if the node cannot be reached, is lost, or needs longer.
        """
        try:
            return self._run_over(self._connect(), arguments, input, Deadline(seconds))
        except TimeoutError:
            raise ClusterError(
                f"node {self.node} did not answer within {seconds:.0f} s to '{arguments[0]}'"
            ) from None

    def _run_over(
        self, socket: Path, arguments: Sequence[str], input: bytes | None, limit: Deadline
    ) -> Completed:
        with self._sessions:
            try:
                marked = self.command(marked_command(arguments), socket)[1:]
                done = _run_ssh(self.node, marked, input, limit)
            except TimeoutError:
                self._abandon(socket)
                raise
        if done.status == SSH_FAILED:
            self._abandon(socket)
            raise ssh_error(self.node, done.stderr.decode(errors="replace"))
        return self._without_greeting(done, arguments)

    def _without_greeting(self, done: Completed, arguments: Sequence[str]) -> Completed:
        """Cut the output of the user's start-up files there, which precedes the command's."""
        _, mark, output = done.stdout.partition(_MARK + b"\n")
        if mark:
            return replace(done, stdout=output)
        if done.status == 0:
            raise ClusterError(
                f"a start-up file on node {self.node} ends the shell before '{arguments[0]}' runs",
                f"look at ~/.bashrc, ~/.zshenv or ~/.config/fish there: ssh {self.node} true",
            )
        return done

    def reach(self, seconds: float) -> None:
        """Verify that commands reach the node, within a shorter time than ssh's own limits.

        An existing connection proves nothing: if the link loses all packets silently, ssh notices
        only after several missing keepalive answers.

        Raises:
            ClusterError: if the node does not answer in time, or cannot be reached.
        """
        limit = Deadline(seconds)
        socket = self._connect(limit)
        left = max(limit.left_seconds, _LEAST_SECONDS)
        try:
            self._run_over(socket, ["true"], None, Deadline(left))
        except TimeoutError:
            raise timed_out(self.node, seconds) from None

    def _connect(self, limit: Deadline | None = None) -> Path:
        """Return the socket of the shared connection, connecting first if there is none."""
        limit = limit or Deadline(_CONNECT_LIMIT_SECONDS)
        with self._lock:
            if self._socket is not None and self._socket.parent.is_dir():
                return self._socket
            socket = _socket_folder() / secrets.token_hex(6)
            try:
                done = _run_ssh(self.node, self.command(["true"], socket)[1:], None, limit)
            except TimeoutError:
                _end_master(self.node, socket, "exit")
                raise timed_out(self.node, limit.seconds) from None
            if done.status == SSH_FAILED:
                raise ssh_error(self.node, done.stderr.decode(errors="replace"))
            self._socket = socket
            return socket

    def _abandon(self, socket: Path) -> None:
        """Stop using a connection: commands that run over it go on, the next makes a new one."""
        with self._lock:
            if self._socket == socket:
                self._socket = None
                _end_master(self.node, socket, "stop")

    def close(self) -> None:
        """End the shared connection."""
        with self._lock:
            socket, self._socket = self._socket, None
        if socket is not None:
            _end_master(self.node, socket, "exit")


def _end_master(node: str, socket: Path, how: str) -> None:
    """Ask the process that holds a connection to end it, and remove its socket in any case."""
    if not socket.exists():
        return
    with contextlib.suppress(TimeoutError, ClusterError):
        _run_ssh(
            node,
            ["-O", how, "-o", f"ControlPath={socket}", "--", node],
            None,
            Deadline(_CONTROL_SECONDS),
        )
    socket.unlink(missing_ok=True)


def _run_ssh(
    node: str, arguments: Sequence[str], input: bytes | None, limit: Deadline
) -> Completed:
    """Run ssh.

    Raises:
        TimeoutError: if it takes longer.
        ClusterError: if there is no ssh.
    """
    # A file, because older versions of ssh keep a pipe for stderr open in the background.
    with tempfile.TemporaryFile() as errors:
        try:
            process = subprocess.Popen(
                ["ssh", *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                # Ctrl-C must not reach ssh: k2 still has to clean up over this connection.
                start_new_session=True,
            )
        except OSError as error:
            raise ClusterError(
                f"node {node} cannot be reached: ssh does not run here ({error.strerror})",
                "install the OpenSSH client",
            ) from error
        output = _finish(process, input, limit)
        if process.returncode < 0:
            raise ClusterError(f"the command on node {node} was ended")
        errors.seek(0)
        return Completed(process.returncode, output, errors.read())


def _finish(process: subprocess.Popen[bytes], input: bytes | None, limit: Deadline) -> bytes:
    """Wait for a command and return its stdout; ``end_running_commands`` can end it."""
    with process, _registered(process):
        try:
            return communicate(process, input, limit)[0]
        except subprocess.TimeoutExpired:
            raise TimeoutError from None
        finally:
            if process.poll() is None:
                process.kill()


# --- running commands ---------------------------------------------------------------------------

_running: set[subprocess.Popen[bytes]] = set()
_running_lock = threading.Lock()


@contextlib.contextmanager
def _registered(process: subprocess.Popen[bytes]) -> Iterator[None]:
    with _running_lock:
        _running.add(process)
    try:
        yield
    finally:
        with _running_lock:
            _running.discard(process)


def end_running_commands() -> None:
    """End the commands that other threads wait for; those threads get a ``ClusterError``."""
    with _running_lock:
        for process in _running:
            process.kill()


# --- one connection per node --------------------------------------------------------------------

_connections: dict[str, Connection] = {}
_connections_lock = threading.Lock()


def connection_to(node: str) -> Connection:
    """Return this process's connection to a node."""
    with _connections_lock:
        if not _connections:
            atexit.register(close_connections, os.getpid())
        return _connections.setdefault(node, Connection(node))


def close_connections(owner: int | None = None) -> None:
    """End all connections of this process; does nothing in a fork of the process ``owner``."""
    if owner is not None and owner != os.getpid():
        return
    with _connections_lock:
        ended = list(_connections.values())
        _connections.clear()
    threads = [threading.Thread(target=connection.close) for connection in ended]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _socket_folder() -> Path:
    """Return a folder for the sockets, made if needed: of this user alone, with a short path.

    The system removes the folder for running programs when the user logs out, and old folders for
    temporary files. A supervisor goes on, and must still reach the nodes.
    """
    bases = [os.environ.get("XDG_RUNTIME_DIR", ""), tempfile.gettempdir(), "/tmp"]
    for base in filter(None, bases):
        folder = Path(base) / f"k2-ssh-{os.geteuid()}"
        if len(os.fsencode(folder)) + 13 <= _LONGEST_SOCKET_PATH and _make_private(folder):
            return folder
    folder = _unguessable_folder()
    if not folder.is_dir():
        _unguessable_folder.cache_clear()
    return _unguessable_folder()


@functools.cache
def _unguessable_folder() -> Path:
    return Path(tempfile.mkdtemp(prefix="k2-", dir="/tmp"))


def _make_private(folder: Path) -> bool:
    """Make a folder; True if it exists and only this user can write to it."""
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        status = folder.lstat()
    except OSError:
        return False
    own = stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid()
    return own and not status.st_mode & 0o077
