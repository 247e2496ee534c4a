"""The process of a rank, for its guard: start it, read its output, end it, find why it ended.

The rank inherits two descriptors: one end of a socket pair for messages, and its progress page.
It dies with its guard: because its socket closes, and on Linux by PR_SET_PDEATHSIG.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
from collections import deque
from collections.abc import AsyncIterator, Mapping, Sequence

import psutil

from k2cli.guard.oom_evidence import OomEvidence
from k2cli.guard.spawn import spawn_rank
from k2cli.protocol import (
    Bootstrap,
    Fatal,
    GuardMessage,
    RankMessage,
    Shutdown,
    Start,
)
from k2cli.protocol.progress_page import ProgressPage
from k2cli.protocol.wire_streams import AsyncChannel, open_stream
from k2cli.system.memory_use import memory_of

KEPT_LINES = 20
MAX_LINE_CHARACTERS = 4000
_TERMINATE_SECONDS = 1.0
_KILL_SECONDS = 5.0
_DRAIN_SECONDS = 0.5
# Above this share of the machine's memory, a SIGKILL likely came from the kernel.
_HIGH_MEMORY_SHARE = 0.6
_LOW_AVAILABLE_SHARE = 0.05
# What libc++ prints before it aborts: MLX throws some errors on threads of its own.
_UNCAUGHT = "terminating due to uncaught exception"
# Log lines are shown in terminals and must not control them.
_CONTROL_CHARACTERS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f]")


class RankProcess:
    """A running rank. Use ``RankProcess.start`` to make one."""

    def __init__(
        self,
        process: asyncio.subprocess.Process,
        channel: AsyncChannel[RankMessage],
        page: ProgressPage,
        oom_evidence: OomEvidence,
        *,
        over_jaccl: bool,
    ) -> None:
        self._process = process
        self._oom_evidence = oom_evidence
        self._oom_cause = ""
        self._killed_here = False
        self._over_jaccl = over_jaccl
        self._seen: psutil.Process | None = None
        self.channel = channel
        self.page = page
        self.last_lines: deque[str] = deque(maxlen=KEPT_LINES)
        self.fatal: Fatal | None = None
        self.verdict: str | None = None
        self.resident_bytes = 0
        self._memory_was_high = False
        self._output_ended = asyncio.Event()
        self._messages_ended = asyncio.Event()

    @classmethod
    async def start(
        cls, bootstrap: Bootstrap, worker: str, job: Mapping[str, str] | None = None
    ) -> RankProcess:
        """Start the rank and send its assignment.

        Args:
            job: the environment variables that make it part of an MPI job.

        Raises:
            OSError: if the process cannot be started.
        """
        spawned = await spawn_rank(bootstrap, worker, job)
        reader, writer = await open_stream(connection=spawned.connection)
        channel: AsyncChannel[RankMessage] = AsyncChannel(reader, writer, RankMessage)
        rank = cls(
            spawned.process,
            channel,
            spawned.page,
            spawned.oom_evidence,
            over_jaccl=bootstrap.assignment.transport == "jaccl",
        )
        control_host = bootstrap.liveness_host
        rank.send(Start(bootstrap.assignment, bootstrap.secret, bootstrap.deadlines, control_host))
        return rank

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def exit_status(self) -> int | None:
        """Exit status as in subprocess: negative for a signal, None while the process runs."""
        return self._process.returncode

    def send(self, message: GuardMessage) -> None:
        """Queue a message for the rank; do nothing if the rank is gone."""
        self.channel.send(message)

    async def lines(self) -> AsyncIterator[str]:
        """Yield the lines of the rank's stdout and stderr; very long lines are cut."""
        assert self._process.stdout is not None
        try:
            async for line in split_lines(self._process.stdout):
                self.last_lines.append(line)
                yield line
        finally:
            self._output_ended.set()

    def is_stopped(self) -> bool:
        """Return True if a signal stopped the process; also record the memory of the process."""
        try:
            view = self._view()
            self._note_memory(view)
            return view.status() in (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP)
        except (psutil.Error, OSError):  # OSError: this machine or this process has no file left
            return False

    def _view(self) -> psutil.Process:
        """Return what psutil sees of the process.

        Raises:
            psutil.Error: if it has ended. It may have ended before anyone looks: a rank can fail as
                soon as it starts, and a thread of asyncio reaps it.
            OSError: if no file is left to look with.
        """
        if self._seen is None:
            if self.exit_status is not None:  # another process may have its id by now
                raise psutil.NoSuchProcess(self.pid)
            self._seen = psutil.Process(self.pid)
        return self._seen

    def _note_memory(self, view: psutil.Process) -> None:
        memory = psutil.virtual_memory()
        self.resident_bytes = memory_of(view)
        self._memory_was_high = self.resident_bytes > _HIGH_MEMORY_SHARE * memory.total or (
            memory.available < _LOW_AVAILABLE_SHARE * memory.total
        )

    async def wait(self) -> int:
        """Wait until the rank is gone and its output is read, and return the exit status."""
        status = await self._process.wait()
        # A grandchild may hold the pipe open, so the wait for the end of the output is limited.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_DRAIN_SECONDS):
                await self._messages_ended.wait()
                await self._output_ended.wait()
        if status == -signal.SIGKILL and not self._killed_here:
            await asyncio.to_thread(self._look_for_oom_kill)
        self._oom_evidence.close()
        return status

    def _look_for_oom_kill(self) -> None:
        counted = self._oom_evidence.has_counted_kill
        kill = self._oom_evidence.find_kill(self.pid, suspected=counted or self._memory_was_high)
        if kill is not None:
            self._oom_cause = f"likely out of memory: {kill}"
        elif counted:
            self._oom_cause = (
                "perhaps out of memory: the kernel has killed a process of its control group"
            )

    async def messages(self) -> AsyncIterator[RankMessage]:
        """Yield the messages of the rank.

        Raises:
            ConnectionLost: when the rank closes the connection, or breaks the protocol.
        """
        try:
            while True:
                yield await self.channel.receive()
        finally:
            self._messages_ended.set()

    def kill(self) -> None:
        """Send SIGKILL, which also ends a stopped process, to the rank and its compilers."""
        self._killed_here = True
        children = self._children()
        self._signal(signal.SIGKILL)
        _kill_all(children)

    def _children(self) -> list[psutil.Process]:
        """List the processes that the rank has started, while they can be told by their parent."""
        try:
            return self._view().children(recursive=True)
        except (psutil.Error, OSError):
            return []

    def _signal(self, number: signal.Signals) -> None:
        # Not with ``send_signal``: before Python 3.13 it looks for the process's end, and if there
        # was one, asyncio cannot find the exit status any more.
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    async def end(self, *, grace_seconds: float) -> bool:
        """End the rank: Shutdown and ``grace_seconds``, then SIGTERM, then SIGKILL.

        Args:
            grace_seconds: 0 skips Shutdown, for a run that has failed.

        Returns:
            True if it is gone; False only if the process hangs in the kernel.
        """
        if grace_seconds > 0:
            self.send(Shutdown())
            if await self.gone_within(grace_seconds):
                return True
        children = self._children()
        self._signal(signal.SIGTERM)
        if await self.gone_within(_TERMINATE_SECONDS):
            _kill_all(children)
            return True
        self.kill()
        return await self.gone_within(_KILL_SECONDS)

    async def gone_within(self, seconds: float) -> bool:
        """Wait for the process to end. Return False if the time is up."""
        try:
            await asyncio.wait_for(self._process.wait(), seconds)
        except TimeoutError:
            return False
        return True

    def exit_is_symptom(self) -> bool:
        """Return True if another rank or guard likely caused the exit."""
        if self.fatal is not None:
            return self.fatal.kind == "lost peer"
        return self.verdict is None and self.exit_status == -signal.SIGTERM

    def cause_of_exit(self) -> str:
        """Return the likely cause of the exit, as one sentence about "it"."""
        status = self.exit_status
        if self.verdict is not None:
            return self.verdict
        if self.fatal is not None:
            return self.fatal.error
        if status is None:
            return "it does not respond"
        if self._oom_cause:
            return f"it was killed (SIGKILL), {self._oom_cause}"
        if status == -signal.SIGKILL and self._memory_was_high:
            return "it was killed (SIGKILL), perhaps because the machine ran out of memory"
        if status < 0:
            return f"it was killed by {signal_name(-status)}{self._crash(-status)}"
        return f"it exited with status {status}"

    def _crash(self, number: int) -> str:
        """Say more about a signal by which the rank's own code ended: what C++ said, or JACCL."""
        if number == signal.SIGABRT:
            said = (line for line in reversed(self.last_lines) if _UNCAUGHT in line)
            return f": {line}" if (line := next(said, "")) else ""
        if self._over_jaccl and number in (signal.SIGSEGV, signal.SIGBUS):
            return (
                ", as ranks over JACCL are when a Thunderbolt cable between them is pulled out "
                "(mlx#4192) or fails"
            )
        return ""


def _kill_all(processes: Sequence[psutil.Process]) -> None:
    """Send SIGKILL to those that still live; none of them can have got another one's id."""
    for process in processes:
        with contextlib.suppress(psutil.Error, OSError):
            process.kill()


def signal_name(number: int) -> str:
    """Return the name of a signal, ``SIGKILL`` for 9, or its number if it has no name."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


async def split_lines(stream: asyncio.StreamReader) -> AsyncIterator[str]:
    """Yield the lines of a stream, ended by newline or carriage return, without empty ones.

    Lines are cut at ``MAX_LINE_CHARACTERS``, so memory is bounded.
    """
    pending = b""
    cut = False
    while chunk := await stream.read(2**16):
        *complete, rest = chunk.replace(b"\r", b"\n").split(b"\n")
        for part in complete:
            if (text := _shown(pending + part)) and not cut:
                yield text
            pending, cut = b"", False
        pending = b"" if cut else pending + rest
        if len(pending) > MAX_LINE_CHARACTERS:
            yield _shown(pending)
            pending, cut = b"", True
    if text := _shown(pending):
        yield text


def _shown(line: bytes) -> str:
    text = _CONTROL_CHARACTERS.sub("", line.decode(errors="replace")).rstrip()
    return text if len(text) <= MAX_LINE_CHARACTERS else text[:MAX_LINE_CHARACTERS] + " [cut]"


def describe(error: BaseException) -> str:
    """Return the type and message of an exception in one line."""
    return f"{type(error).__name__}: {error}"
