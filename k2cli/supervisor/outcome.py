"""Describe how a run ended, in values and in words."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from k2cli.errors import ClusterError
from k2cli.nodes.node import LOCALHOST
from k2cli.protocol import RankFailed
from k2cli.runs.record import FailureRecord, RunRecord

if TYPE_CHECKING:
    from k2cli.launch.guard_commands import GuardCommand

# Exit status of ssh if the connection was lost, or the process at its other end was killed.
_SSH_LOST = 255


@dataclass(frozen=True, slots=True)
class Outcome:
    """The reason for the end of a run. ``failure`` is None if the user stopped the run.

    ``wait``: the processes may end by themselves, so give them time before they are killed.
    """

    cause: str
    failure: FailureRecord | None
    wait: bool = True

    @property
    def has_failed(self) -> bool:
        """True if the run failed, False if the user stopped it."""
        return self.failure is not None

    @classmethod
    def stopped(cls, cause: str, *, wait: bool = True) -> Outcome:
        """Describe an end that the user asked for."""
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
        """Describe a failure; ``cause`` calls the rank "it" if a single one has failed."""
        whole = cause if rank is None else f"rank {rank} on {node} failed: {cause}"
        return cls(whole, FailureRecord(cause, rank, node, exit_status, tuple(last_lines)), wait)

    def after(self, failures: int, first_cause: str) -> Outcome:
        """Return this outcome, extended by the number of failures and the first cause."""
        if first_cause == self.cause:
            return replace(self, cause=f"{self.cause} ({failures} failures in a row)")
        return replace(
            self,
            cause=f"{first_cause}; given up after {failures} failures in a row, "
            f"the last one: {self.cause}",
        )

    @classmethod
    def of_failure(cls, event: RankFailed) -> Outcome:
        """Describe the failure that a guard has reported."""
        return cls.failed(
            event.cause,
            rank=event.rank,
            node=event.node,
            exit_status=event.exit_status,
            last_lines=event.last_lines,
        )


def describe_status(status: int) -> str:
    """Describe an exit status of ``subprocess`` in words."""
    if status >= 0:
        return f"exited with status {status}"
    try:
        return f"was killed by {signal.Signals(-status).name}"
    except ValueError:
        return f"was killed by signal {-status}"


def lost_connection(command: GuardCommand, status: int) -> bool:
    """True if ssh to a guard has failed: the node is lost, or the guard was killed there."""
    return status == _SSH_LOST and bool(command.ranks) and command.node != LOCALHOST


def describe_exit(command: GuardCommand, status: int) -> str:
    """Describe the end of a process that should have outlived the run."""
    if lost_connection(command, status):
        return f"the ssh connection to its guard ended (status {status})"
    program = "mpirun" if command.program == "mpirun" else "its guard"
    return f"{program} {describe_status(status)}"


def error_of(record: RunRecord) -> ClusterError:
    """Return the error for a failed run: its cause, and the command that shows its log."""
    hint = f"k2 logs {record.run_id}"
    if record.left:
        hint += (
            f", and once the node can be reached: k2 cluster clean --nodes {','.join(record.left)}"
        )
    failure = record.failure
    if failure is None or failure.rank is None:
        return ClusterError(f"{record.run_id} failed: {record.cause}", hint)
    status = ""
    if failure.exit_status is not None:
        words = describe_status(failure.exit_status)
        status = "" if words.split()[-1] in failure.cause else f" ({words})"
    if record.attempts:
        return ClusterError(f"{record.run_id} failed{status}: {record.cause}", hint)
    also = "".join(f"; {problem}" for node, problem in record.left.items() if node == failure.node)
    return ClusterError(
        f"rank {failure.rank} on {failure.node} failed{status}: {failure.cause}{also}", hint
    )
