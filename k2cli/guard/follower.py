"""The guard of a follower rank: follows the leader's guard, and ends the rank if that is gone."""

from __future__ import annotations

import asyncio
from typing import Any

from k2cli.errors import ClusterError
from k2cli.guard.base import Guard
from k2cli.guard.liveness import GuardConnection, connect_to_leader
from k2cli.guard.supervisor_pipe import wait_until_stdin_closes
from k2cli.protocol import (
    Bootstrap,
    ControlEndpoint,
    Heartbeat,
    LivenessMessage,
    LoadProgress,
    LogLine,
    RankMessage,
    RankReady,
    RunActivity,
    StopRun,
)
from k2cli.protocol.wire import ConnectionLost
from k2cli.stderr import say_on_stderr

_LAST_WORD_SECONDS = 3.0
# Log lines beyond these are dropped while there is no connection to the leader's guard.
_WAITING_EVENTS = 1_000
_LEADER_ENDS_SECONDS = 8.0


class FollowerGuard(Guard):
    """The guard of one follower rank, over one attempt."""

    def __init__(self, bootstrap: Bootstrap, worker: str) -> None:
        super().__init__(bootstrap, worker)
        self._leader: GuardConnection | None = None
        self._connected = asyncio.Event()
        self._leader_gone = asyncio.Event()
        self._ordered = asyncio.Event()
        # Events from before the connection to the leader's guard; sent once it exists.
        self._waiting: list[LivenessMessage] = []
        # May arrive before the rank has started.
        self._endpoint: ControlEndpoint | None = None

    async def run(self) -> int:
        """Guard the rank until the run ends.

        Returns:
            0 if the leader's guard ordered the end, 5 if it is gone.
        """
        self.spawn(self._talk_to_leader())
        self.spawn(self._watch_supervisor())
        if await self.start_rank():
            self._announce()
        ending = await self.wait_for_ending()
        await self.end_rank(ending)
        await self._report_end()
        self.release_mpi(ending, in_reach=self._ordered.is_set())
        await self.release_lock(ending)
        self.cancel_tasks()
        return 0 if self._ordered.is_set() else ClusterError.exit_code

    async def _report_end(self) -> None:
        """Send the last events to the leader's guard, and let it be the first to exit."""
        # A rank may fail long before the leader's guard is there: on a machine that is slow, or
        # behind a slow connection. Only this guard knows why.
        await self._unless_leader_gone(self._connected, self.deadlines.initialisation)
        if self._leader is None:
            say_on_stderr(f"guard: {(await self.wait_for_ending()).cause}")
            return
        await self._unless_leader_gone(self._ordered, _LAST_WORD_SECONDS)
        self._leader.finish()
        await self._unless_leader_gone(self._leader_gone, _LEADER_ENDS_SECONDS)
        self._leader.close()

    async def _unless_leader_gone(self, event: asyncio.Event, limit_seconds: float) -> None:
        """Wait for an event, the loss of the leader's guard, or the time limit."""
        waits = [asyncio.ensure_future(each.wait()) for each in (event, self._leader_gone)]
        await asyncio.wait(waits, timeout=limit_seconds, return_when=asyncio.FIRST_COMPLETED)
        for wait in waits:
            wait.cancel()

    def emit(self, event: Any) -> None:
        """Send an event to the leader's guard, or keep it until there is a connection."""
        if self._leader is not None:
            self._leader.send(event)
        elif not isinstance(event, LogLine) or len(self._waiting) < _WAITING_EVENTS:
            self._waiting.append(event)

    def _announce(self) -> None:
        """Report the rank's process, and send the rank the endpoint that came before it started."""
        self.emit(self.started_event())
        if self.rank is not None and self._endpoint is not None:
            self.rank.send(self._endpoint)

    def on_rank_message(self, message: RankMessage) -> None:
        """Send progress and readiness on to the leader's guard."""
        if isinstance(message, LoadProgress | RankReady):
            self.emit(message)
        else:
            self.log(f"unexpected {type(message).__name__} from a follower rank")

    async def _watch_supervisor(self) -> None:
        """End the run if the launcher is gone before the leader's guard is connected.

        The launcher keeps this process's stdin open as long as it lives. After the connection is
        made, the leader's guard watches the supervisor.
        """
        await wait_until_stdin_closes()
        if not self._connected.is_set():
            self._leader_gone.set()
            self.end("the launcher is gone: it closed the connection", failed=True)

    async def _talk_to_leader(self) -> None:
        try:
            leader = await connect_to_leader(self.bootstrap)
            leader.send(self.started_event())
            for event in self._waiting:
                leader.send(event)
            self._leader = leader
            self._connected.set()
            self.spawn(self._report(leader))
            while True:
                self._obey(await leader.receive(self.deadlines.liveness))
        except ConnectionLost as error:
            self._leader_gone.set()
            self.end(f"the leader's guard is gone: {error}", failed=True)

    async def _report(self, leader: GuardConnection) -> None:
        while True:
            if self.rank is not None:
                leader.send(self.take_rank_status(self.rank))
            leader.send(Heartbeat())
            await asyncio.sleep(self.deadlines.heartbeat_interval)

    def _obey(self, message: LivenessMessage) -> None:
        match message:
            case StopRun(cause=cause, failed=failed):
                self._ordered.set()
                self.end(cause, failed=failed)
            case ControlEndpoint():
                self._endpoint = message
                if self.rank is not None:
                    self.rank.send(message)
            case RunActivity(working=ranks):
                self.note_working(ranks)
            case Heartbeat():
                pass
            case _:
                self.log(f"unexpected {type(message).__name__} from the leader's guard")
