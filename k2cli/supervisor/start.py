"""Start a prepared run: in this process, or with a supervisor in the background."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

import msgspec

from k2cli.agent.run_processes import kill_run
from k2cli.cluster.node_lookup import node_named
from k2cli.errors import ClusterError
from k2cli.files import APPEND, decode_with, open_regular, read_tail
from k2cli.nodes.locks import release_locks
from k2cli.nodes.node import python_environment
from k2cli.protocol import RunEvent
from k2cli.runs.hand_over import deciding
from k2cli.runs.record import (
    EVENTS_NAME,
    LOG_NAME,
    Listener,
    RunRecord,
    read_record,
    remove_leftovers,
    save_record,
)
from k2cli.supervisor.outcome import describe_status, error_of
from k2cli.supervisor.signals import interrupted_by_signals
from k2cli.units import KIB, MIB, clean_text

_POLL_SECONDS = 0.02
_STOP_SECONDS = 25.0
_SHOWN_LOG_BYTES = 64 * KIB
_EVENT_BYTES = 16 * MIB


def launch_here(
    record: RunRecord, listener: Listener, on_interrupt: Callable[[bool], None]
) -> RunRecord:
    """Supervise a prepared run in this process until it ends.

    Args:
        record: the run.
        listener: receives its events.
        on_interrupt: called at each Ctrl-C, with True at the first.

    Returns:
        The final record of a run that was stopped.

    Raises:
        ClusterError: if the run failed.
    """
    from k2cli.supervisor.supervisor import supervise

    final = supervise(record.folder, listener, on_interrupt)
    if final.state == "failed":
        raise error_of(final)
    return final


@contextmanager
def cleanup_on_error(prepared: RunRecord, say: Callable[[str], None]) -> Iterator[None]:
    """Stop a prepared run if the body fails before a supervisor has taken over the run.

    Such an error is a Ctrl-C before the supervisor handles it, or a failure of the view.
    """
    try:
        yield
    except BaseException:
        record = read_record(prepared.folder)
        if record is None or (record.live and record.pid == os.getpid()):
            say(f"stopping {prepared.run_id}")
            _clean_up(record or prepared)
        raise


def _clean_up(record: RunRecord) -> None:
    nodes = [node_named(name) for name in record.nodes]
    for node in nodes:
        with suppress(ClusterError):  # the guards of such a node end by themselves
            node.kill_run(record.run_id)
            node.remove_bootstraps(record.run_id)
    release_locks(nodes, record.run_id)
    stopped = replace(record, state="stopped", cause="interrupted", ended=time.time())
    with deciding(record.folder):  # a supervisor that was started just now must not begin it
        remove_leftovers(record)
        with suppress(OSError):  # a full disk: the next reader finds that the launcher is gone
            save_record(stopped)


def launch_detached(
    record: RunRecord, listener: Listener, on_interrupt: Callable[[bool], None]
) -> RunRecord:
    """Start a supervisor in the background, and return once the API answers.

    Args:
        record: the run.
        listener: receives the events up to then, except for log lines.
        on_interrupt: called at each Ctrl-C, with True at the first.

    Raises:
        ClusterError: if the run failed before.
        KeyboardInterrupt: after a Ctrl-C stopped the run; a second one kills its processes.
    """
    folder = record.folder
    # Until the supervisor has taken the run over, ``k2 stop`` sends SIGTERM to this process, which
    # must not end without the supervisor that it has started.
    with interrupted_by_signals(signal.SIGTERM):
        supervisor = _start_supervisor(folder)
        try:
            return _wait_until_ready(folder, supervisor, listener)
        except KeyboardInterrupt:
            on_interrupt(True)
            _stop(supervisor, record.run_id, on_interrupt)
            raise


def _start_supervisor(folder: Path) -> subprocess.Popen[bytes]:
    """Start the supervisor of a run as a process that outlives this one."""
    try:
        output = open_regular(folder / LOG_NAME, APPEND, mode=0o600)
    except OSError:  # a full disk, or something else of that name: the supervisor does without
        output = os.open(os.devnull, os.O_WRONLY)
    try:
        return subprocess.Popen(
            [sys.executable, "-P", "-m", "k2cli.supervisor.supervisor", str(folder)],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
            cwd="/",
            env=python_environment(),
        )
    except OSError as error:
        raise ClusterError(f"the supervisor cannot be started: {error}") from error
    finally:
        os.close(output)


def _wait_until_ready(
    folder: Path, supervisor: subprocess.Popen[bytes], listener: Listener
) -> RunRecord:
    events = _EventFile(folder / EVENTS_NAME)
    while True:
        ended = supervisor.poll() is not None
        for event in events.new():
            listener(event)
        record = read_record(folder)
        if record is not None and record.state == "ready":
            return record
        if ended:
            raise _failure(folder, supervisor)
        time.sleep(_POLL_SECONDS)


def follow_start(record: RunRecord, listener: Listener) -> RunRecord | None:
    """Wait until a run that another process starts is ready; None if it was stopped before.

    Args:
        record: the run.
        listener: receives its events.

    Raises:
        ClusterError: if it failed.
    """
    events = _EventFile(record.folder / EVENTS_NAME)
    while True:
        found = read_record(record.folder)
        for event in events.new():
            listener(event)
        if found is not None and found.state == "failed":
            raise error_of(found)
        if found is None or not found.live or not found.has_supervisor:
            return None
        if found.state == "ready":
            return found
        time.sleep(_POLL_SECONDS)


def _failure(folder: Path, supervisor: subprocess.Popen[bytes]) -> ClusterError:
    record = read_record(folder)
    if record is not None and record.state == "failed":
        return error_of(record)
    if record is not None and record.state == "stopped":
        return ClusterError(f"{record.run_id} was stopped before it was ready: {record.cause}")
    said: list[str] = []
    with suppress(OSError):
        tail = read_tail(folder / LOG_NAME, _SHOWN_LOG_BYTES)
        said = clean_text(tail.decode(errors="replace")).strip().splitlines()
    cause = f"the supervisor ended ({describe_status(supervisor.returncode)})"
    if said:
        cause += f": {said[-1]}"
    if record is not None:
        kill_run(record.run_id)
        remove_leftovers(record)
        with suppress(OSError):
            save_record(replace(record, state="failed", cause=cause, ended=time.time()))
    return ClusterError(cause, "k2 ps")


def _stop(
    supervisor: subprocess.Popen[bytes], run_id: str, on_interrupt: Callable[[bool], None]
) -> None:
    supervisor.send_signal(signal.SIGTERM)
    try:
        try:
            supervisor.wait(_STOP_SECONDS)
        except KeyboardInterrupt:
            on_interrupt(False)
            supervisor.send_signal(signal.SIGINT)
            supervisor.wait(_STOP_SECONDS)
    except subprocess.TimeoutExpired:
        supervisor.kill()
        supervisor.wait()
        kill_run(run_id)


class _EventFile:
    """The file to which a supervisor appends events."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0
        self._decoder: msgspec.json.Decoder[RunEvent] = msgspec.json.Decoder(RunEvent)

    def new(self) -> list[RunEvent]:
        """Return the events that were completely written since the last call."""
        try:
            with os.fdopen(open_regular(self._path), "rb") as file:
                file.seek(self._offset)
                data = file.read(_EVENT_BYTES)
        except OSError:
            return []  # there is none yet
        whole = data[: data.rfind(b"\n") + 1]
        self._offset += len(whole)
        found = []
        for line in whole.splitlines():
            with suppress(msgspec.MsgspecError):  # a disk that was full may have cut a line
                found.append(decode_with(partial(self._decoder.decode, line)))
        return found
