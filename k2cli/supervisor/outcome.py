"""How a run ended, and the words for it."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from dataclasses import dataclass, replace

from k2cli.errors import ClusterError
from k2cli.launch.guard_commands import GuardCommand
from k2cli.nodes.node import LOCALHOST
from k2cli.protocol import RankFailed
from k2cli.runs.record import FailureRecord, RunRecord

# Of ssh: the connection was lost, or the process at its other end was killed.
_SSH_LOST = 255


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
        """An end by itself; ``cause`` speaks of ``rank`` as "it" where one is to blame."""
        whole = cause if rank is None else f"rank {rank} on {node} failed: {cause}"
        return cls(whole, FailureRecord(cause, rank, node, exit_status, tuple(last_lines)), wait)

    def after(self, failures: int, first_cause: str) -> Outcome:
        """The same at the end of a run that was given up after several failures."""
        if first_cause == self.cause:
            return replace(self, cause=f"{self.cause} ({failures} failures in a row)")
        return replace(
            self,
            cause=f"{first_cause}; given up after {failures} failures in a row, "
            f"at last: {self.cause}",
        )

    @classmethod
    def of_failure(cls, event: RankFailed) -> Outcome:
        """The end that a guard has reported."""
        return cls.failed(
            event.cause,
            rank=event.rank,
            node=event.node,
            exit_status=event.exit_status,
            last_lines=event.last_lines,
        )


def describe_status(status: int) -> str:
    """An exit status as subprocess gives it, in words."""
    if status >= 0:
        return f"exited with status {status}"
    try:
        return f"was killed by {signal.Signals(-status).name}"
    except ValueError:
        return f"was killed by signal {-status}"


def lost_connection(command: GuardCommand, status: int) -> bool:
    """Whether a guard's end is that of ssh: its node is lost, or it was killed there."""
    return status == _SSH_LOST and bool(command.ranks) and command.node != LOCALHOST


def describe_exit(command: GuardCommand, status: int) -> str:
    """What it means that a process which should outlive the run has ended."""
    if lost_connection(command, status):
        return f"the ssh connection to its guard ended (status {status})"
    program = "mpirun" if command.program == "mpirun" else "its guard"
    return f"{program} {describe_status(status)}"


def failure_of(record: RunRecord) -> ClusterError:
    """The error that says why a run has failed, and where to read on."""
    hint = f"k2 logs {record.run_id}"
    if record.left:
        hint += f", and once it can be reached: k2 cluster clean --nodes {','.join(record.left)}"
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
