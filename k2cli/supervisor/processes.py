"""Start, read, wait for and kill the processes of a supervisor: guards (also over ssh) and mpirun.

The supervisor decides what their messages and their exits mean for the run.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import msgspec

from k2cli.files import decode_with
from k2cli.launch.guard_commands import GuardCommand
from k2cli.nodes.node import Node
from k2cli.protocol import RunEvent, SupervisorMessage
from k2cli.supervisor.attempt import Attempt
from k2cli.supervisor.journal import Journal
from k2cli.supervisor.outcome import lost_connection

# The time that processes have to exit by themselves after the last event.
_EXIT_SECONDS = 2.0
_DRAIN_SECONDS = 2.0
_encoder = msgspec.json.Encoder()
_decoder: msgspec.json.Decoder[RunEvent] = msgspec.json.Decoder(RunEvent)
Spawn = Callable[[Coroutine[Any, Any, None]], asyncio.Task[None]]


@dataclass(frozen=True, slots=True, eq=False)
class _Started:
    """A process and its command."""

    command: GuardCommand
    process: asyncio.subprocess.Process


class Processes:
    """The child processes of one supervisor.

    Args:
        journal: receives every line that is not a message of the protocol.
        on_event: receives every event of the leader's guard.
        current: returns the current attempt; the leader's guard may outlive several.
        spawn: starts a task and reports its failure.
    """

    def __init__(
        self,
        journal: Journal,
        on_event: Callable[[RunEvent], None],
        current: Callable[[], Attempt],
        spawn: Spawn,
    ) -> None:
        self._journal = journal
        self._on_event = on_event
        self._current = current
        self._spawn = spawn
        self._all: list[_Started] = []
        self._leader: _Started | None = None

    # --- start and conversation -----------------------------------------------------------------

    async def start(
        self,
        node: Node,
        command: GuardCommand,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """Start a process on a node. ``tell`` sends messages to that of rank 0.

        Args:
            node: the machine.
            command: the process.
            environment: variables to add to those of k2.

        Raises:
            ClusterError: if it cannot be started.
        """
        started = _Started(command, await node.start(command.arguments, environment))
        self._all.append(started)
        leads = 0 in command.ranks
        if leads:
            self._leader = started
        self._watch(started, leads=leads)

    @property
    def leader_lives(self) -> bool:
        """True if the leader's guard was started and has not exited."""
        return self._leader is not None and self._leader.process.returncode is None

    def tell(self, message: SupervisorMessage) -> None:
        """Send a message to the leader's guard if its pipe is open."""
        if self._leader and (stdin := self._leader.process.stdin) and not stdin.is_closing():
            stdin.write(_encoder.encode(message) + b"\n")

    # --- watching -------------------------------------------------------------------------------

    def _watch(self, started: _Started, *, leads: bool) -> None:
        command, process = started.command, started.process
        assert process.stdout is not None
        assert process.stderr is not None
        output = self._read_events if leads else self._read_noise
        readers = [
            self._spawn(output(command, process.stdout)),
            self._spawn(self._read_noise(command, process.stderr)),
        ]
        if not command.ranks and process.stdin is not None:
            # The pipe to a guard stays open: its end tells the guard that the supervisor is gone.
            process.stdin.close()
        self._spawn(self._await_exit(started, readers, None if leads else self._current()))

    async def _read_events(self, command: GuardCommand, stream: asyncio.StreamReader) -> None:
        async for line in _lines(stream):
            try:
                event = decode_with(partial(_decoder.decode, line))
            except msgspec.MsgspecError:
                self._journal.log_line(command, line)
                continue
            self._on_event(event)

    async def _read_noise(self, command: GuardCommand, stream: asyncio.StreamReader) -> None:
        async for line in _lines(stream):
            # mpirun then complains that its processes ended without using MPI.
            if not (self._current().is_over and command.program == "mpirun"):
                self._journal.log_line(command, line)

    async def _await_exit(
        self, started: _Started, readers: list[asyncio.Task[None]], attempt: Attempt | None
    ) -> None:
        """End the current attempt when one of its processes exits.

        The leader's guard outlives attempts, so its exit ends whichever attempt is running.
        """
        command = started.command
        status = await started.process.wait()
        attempt = attempt if attempt is not None else self._current()
        if not attempt.is_over:
            attempt.note_exit(command, status)
        # Its last lines may explain the exit; a grandchild may hold the pipe open for longer.
        await asyncio.wait(readers, timeout=_DRAIN_SECONDS)
        if 0 not in command.ranks:
            # Wait for the report of the guard of rank 0, which knows more about the loss.
            await asyncio.sleep(_DRAIN_SECONDS)
        attempt.finish_by_exit(command, status)

    # --- the end --------------------------------------------------------------------------------

    async def wait_for_exit(self) -> None:
        """Give the processes time to exit by themselves."""
        if not self._all:
            return
        waits = [asyncio.create_task(started.process.wait()) for started in self._all]
        _, pending = await asyncio.wait(waits, timeout=_EXIT_SECONDS)
        for wait in pending:
            wait.cancel()

    def nodes_without_guards(self) -> set[str]:
        """Return the nodes whose guards have all exited by themselves."""
        guards = [started for started in self._all if started.command.ranks]
        doubtful = {started.command.node for started in guards if not _has_exited(started)}
        return {started.command.node for started in guards} - doubtful

    def kill(self, *, spare_leader: bool = False) -> None:
        """SIGKILL the processes and their sessions, except for a leader's guard that stays."""
        for started in self._all:
            spared = spare_leader and started is self._leader
            if started.process.returncode is None and not spared:
                # PermissionError: macOS refuses it for a group whose processes have all ended.
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(started.process.pid, signal.SIGKILL)

    def forget(self, *, keep_leader: bool = False) -> None:
        """Drop the processes of an attempt that is over, except for a leader's guard that stays."""
        if not keep_leader:
            self._leader = None
        self._all = [self._leader] if self._leader is not None else []

    async def reap(self) -> None:
        """Wait for the exit of the processes that were killed."""
        for started in self._all:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(started.process.wait(), _DRAIN_SECONDS)


async def _lines(stream: asyncio.StreamReader) -> AsyncIterator[bytes]:
    """Yield the lines of a stream, with a note for each that is longer than its limit.

    Reading goes on after those: a process whose output nobody reads would wait for ever.
    """
    while True:
        try:
            line = await stream.readline()
        except ValueError:  # the stream has dropped what it has of the line
            line = b"[a line is left out: it is too long]\n"
        if not line:
            return
        yield line


def _has_exited(started: _Started) -> bool:
    status = started.process.returncode
    return status is not None and status >= 0 and not lost_connection(started.command, status)
