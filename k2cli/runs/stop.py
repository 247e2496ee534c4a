"""Stop a run: signal its supervisor, then kill the processes that remain."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

from k2cli.cluster.node_lookup import node_named
from k2cli.errors import ClusterError
from k2cli.nodes.locks import release_locks
from k2cli.nodes.node import REACH_SECONDS
from k2cli.pauses import Deadline
from k2cli.runs.hand_over import deciding
from k2cli.runs.record import RunRecord, RunState, read_record, remove_leftovers, save_record

# A supervisor needs the ranks' grace, then SIGTERM, SIGKILL and a check of every node.
_SUPERVISOR_SECONDS = 20.0
_POLL_SECONDS = 0.1
_TAKE_OVERS = 3
"""Attempts to stop a run that another process takes over meanwhile."""


@dataclass(frozen=True, slots=True)
class StopReport:
    """The result for one run. ``killed`` counts processes that did not exit by themselves."""

    run_id: str
    state: RunState
    killed: int
    was_live: bool


def stop_run(record: RunRecord) -> StopReport:
    """Stop a run and verify that no process of it is left on any node, even if it has ended.

    Raises:
        ClusterError: if a process is left, or a node cannot be asked.
    """
    was_live, killed = record.live, 0
    for tries_left in reversed(range(_TAKE_OVERS)):
        killed += _stop_processes(record)
        state = _final_state(record, always=not tries_left)
        if state is not None:
            break
        record = read_record(record.folder) or record  # with the supervisor that has taken it over
    assert state is not None
    return StopReport(record.run_id, state, killed, was_live)


def _stop_processes(record: RunRecord) -> int:
    """Stop the supervisor and all processes of a run; return how many had to be killed.

    Raises:
        ClusterError: if a process is left, or a node cannot be asked.
    """
    if record.has_supervisor and record.live:
        _ask_supervisor(record)
    killed = 0
    problems, unreached = [], []
    doubtful = _unreachable_before(record)
    for name in record.nodes:
        node = node_named(name)
        try:
            if name in doubtful:
                node.reach(REACH_SECONDS)
            killed += len(node.processes_of_run(record.run_id))
            left = node.kill_run(record.run_id)
        except ClusterError as error:
            problems.append(error.message)
            unreached.append(name)
        else:
            problems += [f"process {process.pid} on {name} could not be killed" for process in left]
    if problems:
        raise ClusterError(
            f"processes of {record.run_id} may be left: {'; '.join(problems)}",
            _look_again(unreached) if unreached else "k2 ps",
        )
    release_locks([node_named(name) for name in record.nodes], record.run_id)
    return killed


def _unreachable_before(record: RunRecord) -> Collection[str]:
    """Return the nodes that did not answer before, which get a shorter time limit."""
    if record.state == "orphaned":
        return record.nodes
    latest = read_record(record.folder)
    return latest.left if latest is not None else ()


def _look_again(nodes: Sequence[str]) -> str:
    names = ",".join(nodes)
    return (
        "a guard that has lost its leader ends the processes on its node; "
        f"to check, once the node can be reached: k2 cluster clean --nodes {names}"
    )


def _ask_supervisor(record: RunRecord) -> None:
    """Send SIGTERM, and SIGKILL if the supervisor does not exit in time.

    A detached launch hands its run over to another process, perhaps at this very moment: so the
    record is read again and again, and each process that answers for the run is asked.
    """
    for number, seconds in ((signal.SIGTERM, _SUPERVISOR_SECONDS), (signal.SIGKILL, 5.0)):
        asked: set[int] = set()
        limit = Deadline(seconds)
        while not limit.has_passed:
            record = read_record(record.folder) or record
            if not record.has_supervisor:
                return
            if record.pid not in asked:
                asked.add(record.pid)
                with suppress(ProcessLookupError):
                    os.kill(record.pid, number)
            time.sleep(_POLL_SECONDS)


def _final_state(record: RunRecord, *, always: bool) -> RunState | None:
    """Return the state that the supervisor has written; if it was killed, write ``stopped``.

    Returns:
        None, unless ``always``, if a supervisor lives: it has taken the run over from a launcher
        that was ended.
    """
    with deciding(record.folder):
        latest = read_record(record.folder) or record
        if latest.live and latest.has_supervisor and not always:
            return None
        if latest.live or latest.state == "orphaned":
            latest = replace(latest, state="stopped", cause="stopped", ended=time.time())
            remove_leftovers(latest)
            with suppress(OSError):  # a full disk: the next reader finds that the launcher is gone
                save_record(latest)
        return latest.state
