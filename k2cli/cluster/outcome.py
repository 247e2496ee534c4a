"""How a run ended, and the words for it."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from dataclasses import dataclass

from k2cli.cluster.launchers import GuardCommand
from k2cli.cluster.runs import FailureRecord, RunRecord
from k2cli.errors import ClusterError
from k2cli.runtime.protocol import RankFailed


@dataclass(frozen=True, slots=True)
class Outcome:
    """Why a run is over. ``failure`` is None if somebody asked for its end.

    ``wait`` False: its processes will not leave by themselves, or nobody wants to wait for that.
    """

    cause: str
    failure: FailureRecord | None
    wait: bool = True

    @property
    def has_failed(self) -> bool:
        """Whether nobody asked for it."""
        return self.failure is not None

    @classmethod
    def stopped(cls, cause: str, *, wait: bool = True) -> Outcome:
        """An end that somebody asked for."""
        return cls(cause, None, wait)

    @classmethod
    def failed(
        cls,
        cause: str,
        *,
        rank: int | None = None,
        node: str | None = None,
        exit_status: int | None = None,
        last_lines: Sequence[str] = (),
        wait: bool = True,
    ) -> Outcome:
        """An end by itself; ``rank`` and ``node`` where one is to blame."""
        return cls(cause, FailureRecord(cause, rank, node, exit_status, tuple(last_lines)), wait)

    @classmethod
    def of_failure(cls, event: RankFailed) -> Outcome:
        """The end that a guard has reported."""
        cause = f"rank {event.rank} on {event.node} failed: {event.cause}"
        failure = FailureRecord(
            event.cause, event.rank, event.node, event.exit_status, tuple(event.last_lines)
        )
        return cls(cause, failure)


def describe_status(status: int) -> str:
    """An exit status as subprocess gives it, in words."""
    if status >= 0:
        return f"exited with status {status}"
    try:
        return f"was killed by {signal.Signals(-status).name}"
    except ValueError:
        return f"was killed by signal {-status}"


def describe_exit(command: GuardCommand, status: int) -> str:
    """What it means that a process which should outlive the run has ended."""
    ranks = " and ".join(map(str, command.ranks))
    whose = "mpirun" if command.program == "mpirun" else f"the guard of rank {ranks}"
    return f"{whose} {describe_status(status)}"


def failure_of(record: RunRecord) -> ClusterError:
    """The error that says why a run has failed, and where to read on."""
    hint = f"k2 logs {record.run_id}"
    failure = record.failure
    if failure is None or failure.rank is None:
        return ClusterError(f"{record.run_id} failed: {record.cause}", hint)
    status = "" if failure.exit_status is None else f" ({describe_status(failure.exit_status)})"
    return ClusterError(
        f"rank {failure.rank} on {failure.node} failed{status}: {failure.cause}", hint
    )
