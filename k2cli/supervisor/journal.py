"""Write the files of a run: its record, its events, and the merged log of all ranks."""

from __future__ import annotations

import os
import sys
import time
from collections import defaultdict, deque
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TextIO

import msgspec
import psutil

from k2cli.agent.activity import start_of
from k2cli.files import APPEND, open_regular
from k2cli.launch.guard_commands import GuardCommand
from k2cli.protocol import (
    GuardStarted,
    LoadProgress,
    LogLine,
    RankFailed,
    RankReady,
    RunEnded,
    RunEvent,
    RunReady,
    RunRestarting,
)
from k2cli.runs.log import MAX_LOG_BYTES, LogEntry, format_entry
from k2cli.runs.record import (
    EVENTS_NAME,
    AttemptRecord,
    FailureRecord,
    RankRecord,
    RunRecord,
    RunState,
    remove_leftovers,
    save_record,
)
from k2cli.supervisor.outcome import Outcome
from k2cli.units import format_bytes, format_duration, format_rate

_KEPT_LINES = 20
_MAX_LINE_CHARACTERS = 4000
_encoder = msgspec.json.Encoder()


class Journal:
    """The files of one run. Only its supervisor writes them.

    Args:
        record: the record as prepared by the launch.
    """

    def __init__(self, record: RunRecord) -> None:
        self.record = record
        self._log_path = record.log_file
        self._log = _opened_log(self._log_path)
        self._began = time.time()
        self._events = os.fdopen(open_regular(record.folder / EVENTS_NAME, APPEND), "ab")
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
        """Write an event to the files."""
        if isinstance(event, LogLine):
            self._write_line(LogEntry(time.time(), event.node, str(event.rank), event.text))
            return
        self._events.write(_encoder.encode(event) + b"\n")
        self._events.flush()
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
            case RunEnded():
                self.say(f"run ended: {event.cause}")

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
        """Record a failed attempt that another one follows."""
        self._events.write(_encoder.encode(event) + b"\n")
        self._events.flush()
        self.say(
            f"attempt {event.attempt - 1} failed: {event.cause}; the next in "
            f"{event.delay_seconds:.0f} s"
        )
        ended = AttemptRecord(event.attempt - 1, self._began, time.time(), event.cause, failure)
        attempts = (*self.record.attempts, ended)
        self._save(replace(self.record, state="restarting", cause=event.cause, attempts=attempts))
        self._began = time.time() + event.delay_seconds

    def close(self, outcome: Outcome, left: dict[str, str]) -> RunRecord:
        """Write the final record; ``left`` describes processes that may still live, by node."""
        cause = outcome.cause
        for node, problem in left.items():
            cause += f"; on {node}: {problem}"
        state: RunState = "failed" if outcome.has_failed else "stopped"
        self.say(f"{state}: {cause}")
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
            # A full disk must not end a working run; the record is then out of date.
            sys.stderr.write(f"the record of {record.run_id} cannot be written: {error}\n")

    # --- log ------------------------------------------------------------------------------------

    def log_line(self, command: GuardCommand, line: bytes) -> None:
        """Log a line of a guard or mpirun that is not a message of the protocol."""
        text = line.decode(errors="replace").strip()[:_MAX_LINE_CHARACTERS]
        if not text:
            return
        self._last[command.ranks].append(text)
        source = "mpirun" if command.program == "mpirun" else f"guard-{command.ranks[0]}"
        self._write_line(LogEntry(time.time(), command.node, source, text))

    def last_lines(self, command: GuardCommand) -> Sequence[str]:
        """Return the last lines of a process that are not messages of the protocol."""
        return tuple(self._last[command.ranks])

    def say(self, text: str) -> None:
        self._write_line(LogEntry(time.time(), "launcher", "-", text))

    def _write_line(self, entry: LogEntry) -> None:
        try:
            self._log.write(format_entry(entry) + "\n")
            self._log.flush()
            if self._log.tell() > MAX_LOG_BYTES:
                self._rotate()
        except OSError as error:
            sys.stderr.write(f"the log cannot be written: {error}\n")

    def _rotate(self) -> None:
        """Start a new file and keep only the last full one, so that logs cannot fill the disk."""
        path = self._log_path
        self._log.close()
        path.replace(path.with_suffix(".log.1"))
        self._log = _opened_log(path)


def _opened_log(path: Path) -> TextIO:
    return os.fdopen(open_regular(path, APPEND), "a", encoding="utf-8")
