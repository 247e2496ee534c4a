"""The guard of a follower rank: obeys the leader's guard, and ends everything if it is gone."""

from __future__ import annotations

import asyncio
import os
from typing import Any

from k2cli.errors import ClusterError
from k2cli.runtime.guard_core import Guard
from k2cli.runtime.guard_liveness import GuardConnection, connect_to_leader
from k2cli.runtime.protocol import (
    Bootstrap,
    ControlEndpoint,
    Heartbeat,
    LivenessMessage,
    LoadProgress,
    RankMessage,
    RankReady,
    RankStatus,
    StopRun,
)
from k2cli.runtime.wire import ConnectionLost

_LAST_WORD_SECONDS = 3.0
_LEADER_ENDS_SECONDS = 8.0


class FollowerGuard(Guard):
    """One follower's guard."""

    def __init__(self, bootstrap: Bootstrap, worker: str) -> None:
        super().__init__(bootstrap, worker)
        self._leader: GuardConnection | None = None
        self._leader_gone = asyncio.Event()
        self._ordered = asyncio.Event()
        # What happens before the leader's guard is reached is told once it is.
        self._waiting: list[LivenessMessage] = []

    async def run(self) -> int:
        """Live until the run ends.

        Returns:
            0 if the leader's guard gave the order to end, 5 if it is gone.
        """
        started = asyncio.Event()
        await self.start_rank(started)
        self.spawn(self._talk_to_leader(started))
        ending = await self.wait_for_ending()
        await self.end_rank(ending)
        await self._take_leave()
        self.cancel_tasks()
        return 0 if self._ordered.is_set() else ClusterError.exit_code

    async def _take_leave(self) -> None:
        """Tell the leader's guard that the rank is gone, and let it be the first to exit.

        mpirun takes the exit of one guard for the failure of its run, and ends the others.
        """
        if self._leader is None or self._leader_gone.is_set():
            return
        limits = (
            (self._ordered.wait, _LAST_WORD_SECONDS),
            (
                self._leader_gone.wait,
                _LEADER_ENDS_SECONDS,
            ),
        )
        for wait, seconds in limits:
            gone = asyncio.ensure_future(self._leader_gone.wait())
            other = asyncio.ensure_future(wait())
            await asyncio.wait([gone, other], timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
            gone.cancel()
            other.cancel()
            self._leader.finish()
        self._leader.close()

    def emit(self, event: Any) -> None:
        """Tell the leader's guard."""
        if self._leader is not None:
            self._leader.send(event)
        else:
            self._waiting.append(event)

    def on_rank_message(self, message: RankMessage) -> None:
        """Pass on what a follower may say."""
        if isinstance(message, LoadProgress | RankReady):
            self.emit(message)
        else:
            self.log(f"unexpected {type(message).__name__} from a follower rank")

    async def _talk_to_leader(self, started: asyncio.Event) -> None:
        await started.wait()
        try:
            leader = await connect_to_leader(self.bootstrap)
            leader.send(self.started_event(os.getpid()))
            for event in self._waiting:
                leader.send(event)
            self._leader = leader
            self.spawn(self._report(leader))
            while True:
                self._obey(await leader.receive(self.deadlines.liveness))
        except ConnectionLost as error:
            self._leader_gone.set()
            self.end(f"the leader's guard is gone: {error}", failed=True)

    async def _report(self, leader: GuardConnection) -> None:
        while True:
            if self.rank is not None:
                progress = self.rank.page.read()
                leader.send(RankStatus(self.assignment.rank, progress.steps, progress.phase))
            leader.send(Heartbeat())
            await asyncio.sleep(self.deadlines.heartbeat_interval)

    def _obey(self, message: LivenessMessage) -> None:
        match message:
            case StopRun(cause=cause, failed=failed):
                self._ordered.set()
                self.end(cause, failed=failed)
            case ControlEndpoint():
                if self.rank is not None:
                    self.rank.send(message)
            case Heartbeat():
                pass
            case _:
                self.log(f"unexpected {type(message).__name__} from the leader's guard")
