"""The guard of rank 0 in one attempt; connects supervisor, other guards, rank and HTTP clients."""

from __future__ import annotations

import asyncio
from typing import Any

from k2cli.errors import ClusterError
from k2cli.guard.api_server import ApiServer
from k2cli.guard.base import Ending, Guard
from k2cli.guard.liveness import LivenessServer
from k2cli.guard.supervisor_pipe import SupervisorPipe
from k2cli.protocol import (
    Bootstrap,
    Cancel,
    ControlEndpoint,
    ControlListening,
    EngineReady,
    Finished,
    Generate,
    GuardStarted,
    Heartbeat,
    KvCacheUse,
    LivenessMessage,
    LoadProgress,
    LogLine,
    Paused,
    PromptProgress,
    RankFailed,
    RankMessage,
    RankReady,
    RankStatus,
    RequestFailed,
    RunActivity,
    RunEnded,
    RunReady,
    StopRun,
    Tokens,
    WaitingOrder,
)

_FOLLOWERS_END_SECONDS = 3.0
_FLUSH_SECONDS = 1.0


class LeaderGuard(Guard):
    """The leader's guard during one attempt of a run.

    Args:
        bootstrap: of this attempt.
        worker: the module to run as the rank.
        supervisor: receives all events.
        api: the API, which outlives the attempt.
    """

    def __init__(
        self, bootstrap: Bootstrap, worker: str, supervisor: SupervisorPipe, api: ApiServer
    ) -> None:
        super().__init__(bootstrap, worker)
        self._supervisor = supervisor
        self._liveness = LivenessServer(
            bootstrap, self._on_guard_message, self._on_guard_lost, self.log
        )
        self._api = api
        self._engine_ready = asyncio.Event()
        self._ready = EngineReady()
        # Ranks at work since the last report to the other guards.
        self._working: set[int] = set()

    async def run(self) -> Ending:
        """Guard the rank until the attempt ends, and return the reason."""
        self.spawn(self._report_to_guards())
        await self._start()
        ending = await self.wait_for_ending()
        await self._end(ending)
        self.cancel_tasks()
        return ending

    async def _start(self) -> None:
        try:
            await self._liveness.listen()
            self._api.open()
        except (OSError, ClusterError) as error:
            self.fail(self.failure(str(error), of_rank=False))
            return
        self.spawn(self._expect_guards())
        self.spawn(self._api.wait_until_closed())
        if await self.start_rank():
            self.emit(self.started_event())
            self.spawn(self._announce())

    async def _announce(self) -> None:
        """Report that the run is ready once the engine is ready and the API answers."""
        await self._engine_ready.wait()
        await self._api.wait_until_answering()
        if not self.ending:
            self._api.bridge.ready()
            self.emit(RunReady(self._api.url, self._ready.checked_tokens, self._ready.remark))

    # --- the end --------------------------------------------------------------------------------

    async def _end(self, ending: Ending) -> None:
        self._liveness.broadcast(StopRun(ending.cause, ending.failed))
        self._api.bridge.end(ending.cause, failed=ending.failed)
        _, left, _ = await asyncio.gather(
            self.end_rank(ending), self._wait_for_guards(ending), self._close_api(ending)
        )
        for rank in left:
            self.log(f"the guard of rank {rank} did not confirm that its rank is gone")
        self.release_mpi(ending)
        self.emit(RunEnded(ending.cause, ending.failed))
        await self._supervisor.flush(_FLUSH_SECONDS)
        await self._liveness.close()
        await self.release_lock(ending)

    async def _close_api(self, ending: Ending) -> None:
        """Close the API, unless it has to answer 503 until the next attempt."""
        if not (ending.failed and self.bootstrap.restarts):
            await self._api.close()

    async def _wait_for_guards(self, ending: Ending) -> set[int]:
        grace_seconds = 0.0 if ending.failed else self.deadlines.stop_grace
        return await self._liveness.all_finished(grace_seconds + _FOLLOWERS_END_SECONDS)

    # --- supervisor -----------------------------------------------------------------------------

    def emit(self, event: Any) -> None:
        """Send an event to the supervisor."""
        self._supervisor.send(event)

    # --- the other guards -----------------------------------------------------------------------

    async def _report_to_guards(self) -> None:
        while True:
            self._liveness.broadcast(Heartbeat())
            if self.rank is not None:
                own = self.take_rank_status(self.rank)
                self._api.watch.note(own)
                if own.works:
                    self._working.add(0)
            if self._working:
                self._liveness.broadcast(RunActivity(sorted(self._working)))
                self._working.clear()
            await asyncio.sleep(self.deadlines.heartbeat_interval)

    async def _expect_guards(self) -> None:
        await asyncio.sleep(self.deadlines.initialisation)
        for rank in sorted(self._liveness.missing):
            self._on_guard_lost(
                rank, f"it did not connect within {self.deadlines.initialisation:.0f} s"
            )

    def _on_guard_message(self, rank: int, message: LivenessMessage) -> None:
        match message:
            case RankFailed():
                self.fail(message)
            case LoadProgress() | RankReady():
                self._api.watch.note(message)
                self.emit(message)
            case GuardStarted() | LogLine():
                self.emit(message)
            case RankStatus():
                self._api.watch.note(message)
                if message.works:
                    self._working.add(rank)
                    self.note_working([rank])
            case Heartbeat():
                pass
            case _:
                self.log(f"unexpected {type(message).__name__} from the guard of rank {rank}")

    def _on_guard_lost(self, rank: int, reason: str) -> None:
        if not self.ending:
            node = self.assignment.nodes[rank]
            self.fail(RankFailed(rank, node, f"its guard is gone: {reason}"))

    # --- the leader rank ------------------------------------------------------------------------

    def send_to_rank(self, message: Generate | Cancel) -> None:
        """Send a request of the API to the leader rank."""
        if self.rank is not None:
            self.rank.send(message)

    def on_rank_message(self, message: RankMessage) -> None:
        """Send a message on to the supervisor, the followers or the HTTP request it belongs to."""
        match message:
            case LoadProgress() | RankReady():
                self._api.watch.note(message)
                self.emit(message)
            case PromptProgress() | Paused() | Tokens() | Finished() | RequestFailed():
                self._api.bridge.deliver(message)
            case WaitingOrder(request_ids=request_ids):
                self._api.bridge.waiting.note_order(request_ids)
            case ControlListening(port=port):
                self._liveness.broadcast(ControlEndpoint(self.bootstrap.liveness_host, port))
            case KvCacheUse():
                self._api.watch.note_cache_use(message)
            case EngineReady():
                self._ready = message
                self._engine_ready.set()
            case _:
                self.log(f"unexpected {type(message).__name__} from the leader rank")
