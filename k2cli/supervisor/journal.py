"""Write the files of a run: its record, its events, and the merged log of all ranks.

A file or a terminal that cannot be written does not end a run: lines of the log are dropped, and
the record is written again when there is room.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
import traceback
from collections import defaultdict, deque
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace
from typing import Literal

import msgspec
import psutil

from k2cli.agent.activity import start_of
from k2cli.agent.run_folder import make_reserve, write_private
from k2cli.files import disk_reason
from k2cli.launch.guard_commands import GuardCommand
from k2cli.protocol import (
    GuardStarted,
    LoadProgress,
    LogLine,
    RankFailed,
    RankReady,
    RunEvent,
    RunReady,
    RunRestarting,
    TlsCertificate,
)
from k2cli.runs.log import ACCESS_SENDER, MAX_LOG_BYTES, LogEntry, format_entry
from k2cli.runs.record import (
    CERTIFICATE_NAME,
    EVENTS_NAME,
    AttemptRecord,
    FailureRecord,
    Listener,
    RankRecord,
    RunRecord,
    RunState,
    remove_leftovers,
    save_record,
)
from k2cli.stderr import say_on_stderr
from k2cli.supervisor.line_folder import LineFolder
from k2cli.supervisor.log_file import LogFile
from k2cli.supervisor.outcome import Outcome
from k2cli.units import MIB, format_bytes, format_duration, format_rate, one_line

_KEPT_LINES = 20
_TICK_SECONDS = 1.0
_MAX_EVENTS_BYTES = 16 * MIB
_MAX_LINE_CHARACTERS = 4000
_encoder = msgspec.json.Encoder()


@dataclass(frozen=True, slots=True)
class _Sender:
    """A sender of lines, by its name in the log; ``shown`` is the event that carries its lines."""

    node: str
    name: str
    shown: tuple[int, Literal["rank", "guard", "access"]] | None = None


_LAUNCHER = _Sender("launcher", "-")


class Journal:
    """The files of one run. Only its supervisor writes them.

    Args:
        record: the record as prepared by the launch.
        listener: receives every event that ``note`` gets; of repeated lines, those in the log.
    """

    def __init__(self, record: RunRecord, listener: Listener) -> None:
        self.record = record
        self._listener: Listener | None = listener
        self._began = time.time()
        self._lines = LineFolder(self._write_line)
        self._log = LogFile(record.log_file, MAX_LOG_BYTES, _remark, say_on_stderr)
        events = record.folder / EVENTS_NAME
        self._events = LogFile(events, _MAX_EVENTS_BYTES, None, self.say)
        self._is_saved = True
        self._last: defaultdict[tuple[int, ...], deque[str]] = defaultdict(
            lambda: deque(maxlen=_KEPT_LINES)
        )

    # --- record ---------------------------------------------------------------------------------

    def take_over(self) -> None:
        """Make this process the supervisor in the run's record."""
        own = psutil.Process()
        created, start = own.create_time(), start_of(own.pid)
        self._save(replace(self.record, pid=own.pid, pid_create_time=created, pid_start=start))

    def set_state(self, state: RunState, cause: str = "") -> None:
        """Change the state of a run that has not ended."""
        self._save(replace(self.record, state=state, cause=cause))

    def note(self, event: RunEvent) -> None:
        """Write an event to the files, and show it."""
        if isinstance(event, LogLine):
            # Requests are a sender of their own, so that many of them crowd out no guard's lines.
            name = ACCESS_SENDER if event.source == "access" else str(event.rank)
            sender = _Sender(event.node, name, (event.rank, event.source))
            self._lines.add(sender, event.text)
            return
        self._note_event(event)
        if isinstance(event, LoadProgress) and event.phase == "warming up":
            of = f" {event.number} of {event.count} shapes" if event.count else ""
            who = f"rank {event.rank} on {self._node_of(event.rank)}"
            self.say(f"{who} is warming up{of}: {one_line(event.shape)}")
        match event:
            case GuardStarted():
                self._set_rank(event.rank, guard_pid=event.guard_pid, rank_pid=event.rank_pid)
            case LoadProgress() if self.record.state in ("starting", "restarting"):
                # The cause of the last failure stays until the run is ready again.
                self.set_state("loading", self.record.cause)
            case RankReady():
                self._note_loaded(event)
            case RunReady():
                self.say(f"ready: {event.url}")
                self._save(replace(self.record, state="ready", url=event.url, cause=""))
            case RankFailed():
                self.say(f"rank {event.rank} on {event.node} failed: {event.cause}")
            case TlsCertificate(pem=pem):
                self._keep_certificate(pem)
        self._show(event)

    def _keep_certificate(self, pem: str) -> None:
        """Write the API's certificate, by which commands know the run."""
        try:
            write_private(self.record.run_id, CERTIFICATE_NAME, pem.encode())
        except OSError as error:
            self.say(f"the TLS certificate cannot be kept: {error.strerror or error}")

    def _note_event(self, event: RunEvent) -> None:
        self._events.write(_encoder.encode(event).decode())

    def _note_loaded(self, event: RankReady) -> None:
        self._set_rank(
            event.rank,
            weights_bytes=event.weights_bytes,
            active_memory_bytes=event.active_memory_bytes,
            peak_memory_bytes=event.peak_memory_bytes,
            load_seconds=event.load_seconds,
            bytes_read=event.bytes_read,
            load_bytes_per_second=event.bytes_read / max(event.load_seconds, 1e-9),
        )
        size, duration = format_bytes(event.weights_bytes), format_duration(event.load_seconds)
        rate = format_rate(event.bytes_read, event.load_seconds)
        self.say(
            f"rank {event.rank} on {self._node_of(event.rank)} loaded {size} in {duration}"
            + (f", {rate}" if rate else "")
        )

    def _node_of(self, rank: int) -> str:
        ranks = self.record.ranks
        return ranks[rank].node if 0 <= rank < len(ranks) else "an unknown node"

    def note_restart(self, event: RunRestarting, failure: FailureRecord | None) -> None:
        """Record a failed attempt that another one follows, and show that."""
        self._note_event(event)
        self.say(
            f"attempt {event.attempt - 1} failed: {event.cause}; the next in "
            f"{event.delay_seconds:.0f} s"
        )
        ended = AttemptRecord(event.attempt - 1, self._began, time.time(), event.cause, failure)
        attempts = (*self.record.attempts, ended)
        self._save(replace(self.record, state="restarting", cause=event.cause, attempts=attempts))
        self._began = time.time() + event.delay_seconds
        self._show(event)

    def _show(self, event: RunEvent) -> None:
        if self._listener is None:
            return
        try:
            self._listener(event)
        except OSError as error:  # the terminal is gone, or the output goes to a full disk
            self._listener = None
            self.say(f"the run is no longer shown: {error.strerror or error}")

    def close(self, outcome: Outcome, left: dict[str, str]) -> RunRecord:
        """Write the final record; ``left`` describes processes that may still live, by node."""
        cause = outcome.cause
        for node, problem in left.items():
            cause += f"; on {node}: {problem}"
        state: RunState = "failed" if outcome.has_failed else "stopped"
        self._lines.close()
        # Past the limit of lines: a flood of warnings must not swallow the cause.
        self._write_line(_LAUNCHER, state if cause == state else f"{state}: {cause}")
        remove_leftovers(self.record)
        self._save(
            replace(
                self.record,
                state=state,
                cause=cause,
                failure=outcome.failure,
                left=left,
                ended=time.time(),
            )
        )
        self._log.close()
        self._events.close()
        return self.record

    def _set_rank(self, rank: int, **fields: int | float) -> None:
        ranks: list[RankRecord] = list(self.record.ranks)
        if 0 <= rank < len(ranks):
            ranks[rank] = replace(ranks[rank], **fields)  # type: ignore[arg-type]
            self._save(replace(self.record, ranks=tuple(ranks)))

    def _save(self, record: RunRecord) -> None:
        self.record = record
        try:
            save_record(record)
        except OSError as error:
            if self._is_saved:
                self._is_saved = False
                reason = disk_reason(error, record.folder)
                trouble = f"the record of {record.run_id} cannot be written: {reason}"
                say_on_stderr(trouble)
                self.say(trouble)
        else:
            self._is_saved = True

    @asynccontextmanager
    async def kept(self) -> AsyncIterator[None]:
        """Write what waits once a second, and warnings of libraries, such as asyncio's."""

        async def keep() -> None:
            while True:
                await asyncio.sleep(_TICK_SECONDS)
                self.tick()

        handler = _Handler(self)
        logging.getLogger().addHandler(handler)
        keeper = asyncio.create_task(keep())
        try:
            yield
        finally:
            keeper.cancel()
            logging.getLogger().removeHandler(handler)

    def tick(self) -> None:
        """Write what waits: counts of lines, and a record for which there was no room."""
        self._lines.tick()
        if not self._is_saved:
            self._save(self.record)
        elif self.record.live:
            with suppress(OSError):
                make_reserve(self.record.run_id)

    # --- log ------------------------------------------------------------------------------------

    def log_line(self, command: GuardCommand, line: bytes) -> None:
        """Log a line of a guard or mpirun that is not a message of the protocol."""
        text = line.decode(errors="replace").rstrip()[:_MAX_LINE_CHARACTERS]
        if not text:
            return
        self._last[command.ranks].append(text)
        source = "mpirun" if command.program == "mpirun" else f"guard-{command.ranks[0]}"
        self._lines.add(_Sender(command.node, source), text)

    def last_lines(self, command: GuardCommand) -> Sequence[str]:
        """Return the last lines of a process that are not messages of the protocol."""
        return tuple(self._last[command.ranks])

    def say(self, text: str) -> None:
        """Log a line of the supervisor itself."""
        self._lines.release()
        self._lines.add(_LAUNCHER, text)

    def note_own(self, line: str) -> None:
        """Log a line of this process that may belong to a traceback."""
        self._lines.add(_LAUNCHER, line)

    def note_bug(self, error: BaseException) -> Outcome:
        """Log the traceback of an error that nobody expected, and return the end that it causes."""
        for line in "".join(traceback.format_exception(error)).splitlines():
            self.note_own(line)
        return Outcome.failed(f"internal error: {type(error).__name__}: {error}")

    def _write_line(self, sender: _Sender, text: str) -> None:
        self._log.write(format_entry(LogEntry(time.time(), sender.node, sender.name, text)))
        if sender.shown is not None:
            rank, source = sender.shown
            self._show(LogLine(rank, sender.node, source, text))


def _remark(text: str) -> str:
    return format_entry(LogEntry(time.time(), _LAUNCHER.node, _LAUNCHER.name, text))


class _Handler(logging.Handler):
    """Writes warnings of libraries in this process to the log of the run."""

    def __init__(self, journal: Journal) -> None:
        super().__init__(logging.WARNING)
        self._journal = journal
        self._loop = asyncio.get_running_loop()
        self._thread = threading.get_ident()

    def emit(self, record: logging.LogRecord) -> None:
        """Write a message and its traceback, line by line, in the thread of the journal."""
        lines = self.format(record).splitlines()
        if threading.get_ident() == self._thread:
            self._write(lines)
            return
        with suppress(RuntimeError):  # the loop is closed: the run is over
            self._loop.call_soon_threadsafe(self._write, lines)

    def _write(self, lines: Sequence[str]) -> None:
        for line in lines:
            self._journal.note_own(line)
