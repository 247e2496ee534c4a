"""The guard of rank 0: hub between launcher, other guards, leader rank and HTTP clients."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
from typing import Any

from k2cli.errors import ClusterError
from k2cli.runtime.guard_bridge import EngineBridge
from k2cli.runtime.guard_core import Ending, Guard
from k2cli.runtime.guard_http import ApiServer
from k2cli.runtime.guard_launcher import LauncherPipe
from k2cli.runtime.guard_liveness import LivenessServer
from k2cli.runtime.protocol import (
    Bootstrap,
    Cancel,
    ControlEndpoint,
    ControlListening,
    EngineReady,
    Finished,
    Generate,
    GuardStarted,
    Heartbeat,
    LivenessMessage,
    LoadProgress,
    LogLine,
    PromptProgress,
    RankFailed,
    RankMessage,
    RankReady,
    RankStatus,
    RequestFailed,
    RunEnded,
    RunReady,
    StopRun,
    Tokens,
)
from k2cli.runtime.wire import ConnectionLost

_FOLLOWERS_END_SECONDS = 3.0
_FLUSH_SECONDS = 1.0
_CONNECTIONS_CLOSE_SECONDS = 0.2


class LeaderGuard(Guard):
    """The leader's guard. Made by ``LeaderGuard.create``."""

    def __init__(self, bootstrap: Bootstrap, worker: str, launcher: LauncherPipe) -> None:
        super().__init__(bootstrap, worker)
        self._launcher = launcher
        self._heard_at = asyncio.get_running_loop().time()
        self._liveness = LivenessServer(
            bootstrap, self._on_guard_message, self._on_guard_lost, self.log
        )
        self._bridge = EngineBridge(self._send_to_rank)
        self._api: ApiServer | None = None
        self._api_closed = asyncio.Event()
        if bootstrap.http is not None:
            self._api = ApiServer(bootstrap, bootstrap.http, self._bridge)
        self._engine_ready = asyncio.Event()

    async def run(self) -> int:
        """Live until the run ends.

        Returns:
            0 after an order to stop, 5 if the run failed.
        """
        for work in (self._obey_launcher, self._watch_launcher, self._beat_guards):
            self.spawn(work())
        await self._start()
        ending = await self.wait_for_ending()
        await self._end(ending)
        self.cancel_tasks()
        return ClusterError.exit_code if ending.failed else 0

    async def _start(self) -> None:
        try:
            await self._liveness.listen()
            if self._api is not None:
                self._api.bind()
        except (OSError, ClusterError) as error:
            self.fail(self.failure(str(error), of_rank=False))
            return
        if await self.start_rank():
            self.emit(self.started_event())
            self.spawn(self._expect_guards())
            self.spawn(self._announce())
            if self._api is not None:
                self.spawn(self._serve(self._api))

    async def _serve(self, api: ApiServer) -> None:
        try:
            await api.serve()
        finally:
            self._api_closed.set()

    async def _announce(self) -> None:
        """Say that the run is ready once the engine is and the API answers."""
        await self._engine_ready.wait()
        if self._api is not None:
            await self._api.answering.wait()
        if not self.ending:
            self._bridge.ready()
            self.emit(RunReady(self._api.url if self._api is not None else ""))

    # --- the end --------------------------------------------------------------------------------

    async def _end(self, ending: Ending) -> None:
        self._liveness.broadcast(StopRun(ending.cause, ending.failed))
        self._bridge.end(ending.cause, failed=ending.failed)
        _, left, _ = await asyncio.gather(
            self.end_rank(ending), self._wait_for_guards(ending), self._close_api()
        )
        for rank in left:
            self.log(f"the guard of rank {rank} did not confirm that its rank is gone")
        self.emit(RunEnded(ending.cause, ending.failed))
        await self._launcher.flush(_FLUSH_SECONDS)
        await self._liveness.close()
        if self.bootstrap.scratch_directory is not None and ending.failed:
            shutil.rmtree(self.bootstrap.scratch_directory, ignore_errors=True)
        # Lets the other guards see that the connection closed before mpirun sees this one exit.
        await asyncio.sleep(_CONNECTIONS_CLOSE_SECONDS)

    async def _wait_for_guards(self, ending: Ending) -> set[int]:
        grace_seconds = 0.0 if ending.failed else self.deadlines.stop_grace
        return await self._liveness.all_finished(grace_seconds + _FOLLOWERS_END_SECONDS)

    async def _close_api(self) -> None:
        if self._api is None:
            return
        await self._api.close()
        if self._api.answering.is_set():
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._api_closed.wait(), _FOLLOWERS_END_SECONDS)

    # --- launcher -------------------------------------------------------------------------------

    def emit(self, event: Any) -> None:
        """Tell the launcher."""
        self._launcher.send(event)

    async def _obey_launcher(self) -> None:
        loop = asyncio.get_running_loop()
        reason = "it closed the connection"
        try:
            async for message in self._launcher.messages():
                self._heard_at = loop.time()
                if isinstance(message, StopRun):
                    self.end(message.cause, failed=message.failed)
        except ConnectionLost as error:
            reason = str(error)
        self.end(f"the launcher is gone: {reason}", failed=True)

    async def _watch_launcher(self) -> None:
        loop = asyncio.get_running_loop()
        while not self.ending:
            self._launcher.send(Heartbeat())
            await asyncio.sleep(self.deadlines.heartbeat_interval)
            if loop.time() - self._heard_at > self.deadlines.liveness:
                silence = f"it was silent for {self.deadlines.liveness:.0f} s"
                self.end(f"the launcher is gone: {silence}", failed=True)

    # --- the other guards -----------------------------------------------------------------------

    async def _beat_guards(self) -> None:
        while True:
            self._liveness.broadcast(Heartbeat())
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
            case GuardStarted() | LoadProgress() | RankReady() | LogLine():
                self.emit(message)
            case RankStatus() | Heartbeat():
                pass
            case _:
                self.log(f"unexpected {type(message).__name__} from the guard of rank {rank}")

    def _on_guard_lost(self, rank: int, reason: str) -> None:
        if not self.ending:
            node = self.assignment.nodes[rank]
            self.fail(RankFailed(rank, node, f"its guard is gone: {reason}"))

    # --- the leader rank ------------------------------------------------------------------------

    def _send_to_rank(self, message: Generate | Cancel) -> None:
        if self.rank is not None:
            self.rank.send(message)

    def on_rank_message(self, message: RankMessage) -> None:
        """Pass on, to launcher, followers or the HTTP request that waits for it."""
        match message:
            case LoadProgress() | RankReady():
                self.emit(message)
            case PromptProgress() | Tokens() | Finished() | RequestFailed():
                self._bridge.deliver(message)
            case ControlListening(port=port):
                self._liveness.broadcast(ControlEndpoint(self.bootstrap.liveness_host, port))
            case EngineReady():
                self._engine_ready.set()
            case _:
                self.log(f"unexpected {type(message).__name__} from the leader rank")
