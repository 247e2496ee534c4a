"""One attempt to start and serve a run: its events, and the cause of its end.

One failure causes others: if a rank is lost, its peers end too, and each of them reports that. An
attempt keeps the first failure and the one that explains the others.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from k2cli.launch.guard_commands import GuardCommand
from k2cli.protocol import RankFailed
from k2cli.supervisor.journal import Journal
from k2cli.supervisor.outcome import Outcome, describe_exit, lost_connection


class Attempt:
    """The state of one attempt.

    Args:
        nodes: names, one per rank.
        journal: the run's; the last lines of a process may explain its end.
    """

    def __init__(self, nodes: Sequence[str], journal: Journal) -> None:
        self._nodes = nodes
        self._journal = journal
        self._loop = asyncio.get_running_loop()
        self._over: asyncio.Future[Outcome] = self._loop.create_future()
        self._root: RankFailed | None = None
        # The end of mpirun or of the connection to a node, as this process saw it.
        self._witnessed: Outcome | None = None
        self._ready_at: float | None = None
        # Set once the leader's guard has ended the attempt and all ranks.
        self.guard_ended = asyncio.Event()

    # --- events ---------------------------------------------------------------------------------

    def rank_failed(self, event: RankFailed) -> None:
        """Record a failure that a guard reports; the first one is the cause."""
        self._root = self._root or event

    def ready(self) -> None:
        """Record that the run serves from now on."""
        self._ready_at = self._loop.time()

    def note_exit(self, command: GuardCommand, status: int) -> None:
        """Record the exit of a process if it explains the failures that ranks report."""
        mpirun_killed = command.program == "mpirun" and status < 0
        node_lost = lost_connection(command, status) and self._root is None
        if mpirun_killed or node_lost:
            self._witnessed = self._witnessed or self._outcome_of_exit(command, status)

    def finish(self, outcome: Outcome) -> None:
        """End the attempt; only the first call has an effect."""
        if not self._over.done():
            self._over.set_result(outcome)

    def finish_by_exit(self, command: GuardCommand, status: int) -> None:
        """End the attempt because a process that should outlive it has exited."""
        self.finish(self._outcome_of_exit(command, status))

    def _outcome_of_exit(self, command: GuardCommand, status: int) -> Outcome:
        rank = command.ranks[0] if command.ranks else None
        return Outcome.failed(
            describe_exit(command, status),
            rank=rank,
            node=self._nodes[rank] if rank is not None else None,
            exit_status=status,
            last_lines=self._journal.last_lines(command),
        )

    # --- the end --------------------------------------------------------------------------------

    @property
    def is_over(self) -> bool:
        return self._over.done()

    @property
    def served_seconds(self) -> float:
        """Seconds since the attempt was ready; 0 if it never was."""
        return 0.0 if self._ready_at is None else self._loop.time() - self._ready_at

    async def outcome(self) -> Outcome:
        """Wait for the end; the first failure that a guard has reported takes precedence."""
        outcome = await self._over
        seen = self._witnessed.failure if self._witnessed is not None else None
        if self._witnessed and seen and (self._root is None or seen.rank != self._root.rank):
            # mpirun was killed or a node lost, and the other ranks failed because of it.
            return self._witnessed
        if self._root is not None:
            return Outcome.of_failure(self._root)
        if not outcome.has_failed:
            # The user did not stop the run here, so something else told the guard to end.
            return Outcome.failed(outcome.cause)
        return outcome
