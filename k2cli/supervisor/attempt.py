"""One attempt to bring a run up and to serve it: what is seen of it, and how it ended.

One failure makes the next: a lost rank takes its peers with it, and each of them says so. An
attempt keeps what was seen first and what explains the rest.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from k2cli.launch.guard_commands import GuardCommand
from k2cli.protocol import RankFailed
from k2cli.supervisor.journal import Journal
from k2cli.supervisor.outcome import Outcome, describe_exit, lost_connection


class Attempt:
    """What is known of one attempt.

    Args:
        nodes: names, one per rank.
        journal: of the run: what a process wrote last may explain its end.
    """

    def __init__(self, nodes: Sequence[str], journal: Journal) -> None:
        self._nodes = nodes
        self._journal = journal
        self._loop = asyncio.get_running_loop()
        self._over: asyncio.Future[Outcome] = self._loop.create_future()
        self._root: RankFailed | None = None
        # What became of mpirun or of a node, seen from here.
        self._witnessed: Outcome | None = None
        self._ready_at: float | None = None
        # Of the leader's guard: it has ended the attempt, and every rank with it.
        self.guard_ended = asyncio.Event()

    # --- what is seen ---------------------------------------------------------------------------

    def rank_failed(self, event: RankFailed) -> None:
        """The first one that a guard reports is the cause."""
        self._root = self._root or event

    def ready(self) -> None:
        """From now on it serves."""
        self._ready_at = self._loop.time()

    def note_exit(self, command: GuardCommand, status: int) -> None:
        """Keep an exit that explains what other ranks report of it."""
        mpirun_killed = command.program == "mpirun" and status < 0
        node_lost = lost_connection(command, status) and self._root is None
        if mpirun_killed or node_lost:
            self._witnessed = self._witnessed or self._outcome_of_exit(command, status)

    def finish(self, outcome: Outcome) -> None:
        """It is over; the first to say so is heard."""
        if not self._over.done():
            self._over.set_result(outcome)

    def finish_by_exit(self, command: GuardCommand, status: int) -> None:
        """A process that should outlive it has ended."""
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

    # --- how it ended ---------------------------------------------------------------------------

    @property
    def is_over(self) -> bool:
        """Whether it has ended."""
        return self._over.done()

    @property
    def served_seconds(self) -> float:
        """Since it was ready; 0 if it never was."""
        return 0.0 if self._ready_at is None else self._loop.time() - self._ready_at

    async def outcome(self) -> Outcome:
        """Wait for its end, and prefer the first failure that a guard has reported."""
        outcome = await self._over
        seen = self._witnessed.failure if self._witnessed is not None else None
        if self._witnessed and seen and (self._root is None or seen.rank != self._root.rank):
            # mpirun was killed, or a node lost, and other ranks have only followed.
            return self._witnessed
        if self._root is not None:
            return Outcome.of_failure(self._root)
        if not outcome.has_failed:
            # Nobody asked for it here: the guard was told by somebody else.
            return Outcome.failed(outcome.cause)
        return outcome
