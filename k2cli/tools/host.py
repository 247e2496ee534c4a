"""The chat's side of the process that runs its MCP servers."""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence

from k2cli.errors import K2Error
from k2cli.pauses import Deadline
from k2cli.pip_command import pip_install
from k2cli.protocol.wire import Channel, ConnectionLost
from k2cli.tools.messages import (
    Call,
    CallDone,
    CancelCall,
    Connect,
    Connected,
    Disconnect,
    Failed,
    FromHost,
    ServerEnded,
)
from k2cli.tools.settings import ServerSettings

Stopped = Callable[[], bool]
"""Returns True once the user wants to wait no longer."""

_CONNECT_SECONDS = 45.0
_MARGIN_SECONDS = 5.0
"""Time that the process has beyond the limit of a call, before it is taken for hung."""
_LOOK_SECONDS = 0.1
_END_SECONDS = 8.0
_PACKAGE = "mcp>=2.3,<3"


class ToolHost:
    """The process of one chat's servers, which is started with the first one."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._channel: Channel[FromHost] | None = None
        self._numbers = itertools.count(1)
        self._mark = f"{os.getpid()}-{os.urandom(8).hex()}"
        self.ended: dict[str, str] = {}
        """Servers that ended by themselves since they were connected, with the reason."""

    def connect(
        self, servers: Sequence[ServerSettings], stopped: Stopped
    ) -> dict[str, Connected | Failed]:
        """Start or reach servers at the same time, and return the tools of each.

        Raises:
            K2Error: if the package for it is missing, or the process fails.
            KeyboardInterrupt: if the user stops it; these servers are ended.
        """
        channel = self._open()
        waiting = {}
        for server in servers:
            number = next(self._numbers)
            waiting[number] = server.name
            self.ended.pop(server.name, None)
            self._send(channel, Connect(number, server))
        found: dict[str, Connected | Failed] = {}
        limit = Deadline(_CONNECT_SECONDS)
        while waiting:
            message = self._next(channel, limit)
            if isinstance(message, Connected | Failed) and message.number in waiting:
                found[waiting.pop(message.number)] = message
            if stopped():
                for server in servers:
                    self._send(channel, Disconnect(server.name))
                raise KeyboardInterrupt
        return found

    def call(
        self, call: tuple[str, str, str], seconds: float, stopped: Stopped
    ) -> CallDone | Failed:
        """Call a tool, and return its result or the reason of its failure.

        Args:
            call: the server, the tool, and its arguments as JSON.
            seconds: the limit of the server's settings.

        Raises:
            K2Error: if the process fails.
            KeyboardInterrupt: if the user stops it; the server is told.
        """
        channel, number = self._open(), next(self._numbers)
        self._send(channel, Call(number, *call))
        limit = Deadline(seconds + _MARGIN_SECONDS)
        while True:
            message = self._next(channel, limit)
            if isinstance(message, CallDone | Failed) and message.number == number:
                return message
            if stopped():
                self._send(channel, CancelCall(number))
                raise KeyboardInterrupt

    def look(self) -> None:
        """Take note of servers that have ended.

        Raises:
            K2Error: if the process itself has.
        """
        if self._channel is not None:
            limit = Deadline(_MARGIN_SECONDS)
            while self._next(self._channel, limit, seconds=0.001) is not None:
                if limit.has_passed:  # it talks without end
                    raise self._failed()

    def disconnect(self, name: str) -> None:
        """End a server."""
        if self._channel is not None:
            self._send(self._channel, Disconnect(name))

    def close(self) -> None:
        """End the process and all its servers."""
        channel, process = self._channel, self._process
        self._channel = self._process = None
        if channel is not None:
            channel.close()
        if process is not None:
            try:
                process.wait(_END_SECONDS)
            except subprocess.TimeoutExpired:
                self._kill(process)
            else:
                if process.returncode != 0:  # it was killed, and could not end its servers
                    self._kill_marked()

    def _open(self) -> Channel[FromHost]:
        if self._channel is not None:
            return self._channel
        if importlib.util.find_spec("mcp") is None:
            raise K2Error("tools need the package mcp", pip_install(_PACKAGE))
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                self._process = subprocess.Popen(
                    [
                        sys.executable,
                        "-P",
                        "-m",
                        "k2cli.tools.host_process",
                        str(theirs.fileno()),
                        self._mark,
                    ],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    pass_fds=[theirs.fileno()],
                    # Ctrl-C at the terminal stops a call, and not the servers.
                    start_new_session=True,
                )
            except OSError as error:
                ours.close()
                raise K2Error(f"the process of the tools cannot be started: {error}") from error
        self._channel = Channel(ours, FromHost)
        return self._channel

    def _send(self, channel: Channel[FromHost], message: object) -> None:
        try:
            channel.send(message)
        except ConnectionLost as error:
            raise self._failed() from error

    def _next(
        self, channel: Channel[FromHost], limit: Deadline, seconds: float = _LOOK_SECONDS
    ) -> FromHost | None:
        """Return the next message, or None after a moment without one.

        What has come counts, even if this process was stopped (Ctrl-Z) beyond the limit.

        Raises:
            K2Error: if the process has ended, or says nothing within the limit.
        """
        try:
            message = channel.receive(seconds)
        except ConnectionLost as error:
            raise self._failed() from error
        if isinstance(message, ServerEnded):
            self.ended[message.server] = message.reason
        if message is None and limit.has_passed:
            raise self._failed()
        return message

    def _failed(self) -> K2Error:
        """Give the process up; the next use starts another one."""
        process = self._process
        if self._channel is not None:
            self._channel.close()
        self._channel = self._process = None
        if process is not None:
            self._kill(process)
        return K2Error(
            "the process that runs the tools has ended", "/tools on NAME starts it again"
        )

    def _kill(self, process: subprocess.Popen[bytes]) -> None:
        """Kill the process with everything that it started."""
        from k2cli.tools.processes import descendants

        below = descendants(process.pid)
        process.kill()
        for each in below:
            with contextlib.suppress(Exception):  # psutil's, which is slow to import
                each.kill()
        process.wait()
        self._kill_marked()

    def _kill_marked(self) -> None:
        from k2cli.tools.processes import kill_marked  # psutil is slow to import

        kill_marked(self._mark)
