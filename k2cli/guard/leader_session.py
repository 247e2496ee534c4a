"""The leader's guard from its start to its end, over all attempts of a run.

It holds the connection to the supervisor and the API's port, which outlive an attempt. After a
failure of a run that restarts, the API answers 503 with the cause until the supervisor orders the
next attempt.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

from k2cli.errors import ClusterError
from k2cli.guard.api_server import ApiServer
from k2cli.guard.base import Ending
from k2cli.guard.engine_bridge import EngineBridge
from k2cli.guard.leader import LeaderGuard
from k2cli.guard.supervisor_pipe import SupervisorPipe
from k2cli.protocol import (
    Bootstrap,
    Cancel,
    Generate,
    Heartbeat,
    LogLine,
    NamedKeys,
    NextAttempt,
    RankFailed,
    RunEnded,
    StopRun,
)
from k2cli.protocol.wire import ConnectionLost

_FLUSH_SECONDS = 1.0


class LeaderSession:
    """The leader's guard over all attempts of a run.

    Args:
        bootstrap: of the first attempt, or of the attempt that a fresh guard waits for.
        worker: the module to run as the rank.
        supervisor: the connection to the supervisor.
    """

    def __init__(self, bootstrap: Bootstrap, worker: str, supervisor: SupervisorPipe) -> None:
        self._bootstrap = bootstrap
        self._worker = worker
        self._supervisor = supervisor
        self._loop = asyncio.get_running_loop()
        self._heard_at = self._loop.time()
        bridge = EngineBridge(self._send_to_rank)
        self._api = ApiServer(bootstrap, bridge, self._log_access, supervisor.send)
        self._guard: LeaderGuard | None = None
        # The bootstrap of the next attempt, or None if the run ends without one.
        self._next: asyncio.Future[Bootstrap | None] = self._loop.create_future()
        # An order to end may follow the one to begin again while the last attempt still ends.
        self._final: Ending | None = None
        self._tasks: list[asyncio.Task[None]] = []

    async def run(self) -> int:
        """Serve all attempts until the run ends.

        Returns:
            0 after an order to stop, 5 if the run failed.
        """
        for work in (self._obey_supervisor(), self._watch_supervisor()):
            self._spawn(work)
        ending = await self._attempts()
        self._api.bridge.end(ending.cause, failed=ending.failed)
        await self._api.close()
        await self._supervisor.flush(_FLUSH_SECONDS)
        for task in self._tasks:
            task.cancel()
        return ClusterError.exit_code if ending.failed else 0

    def on_sigterm(self) -> None:
        """End the attempt, or the run between attempts: a user sent SIGTERM."""
        if self._guard is not None:
            self._guard.on_sigterm()
        else:
            self._end(Ending("the leader's guard received SIGTERM", failed=True))

    # --- attempts -------------------------------------------------------------------------------

    async def _attempts(self) -> Ending:
        bootstrap = self._bootstrap
        if bootstrap.hold is not None and not self._open_before_first_attempt(bootstrap):
            return Ending("the API cannot be served", failed=True)
        while True:
            if bootstrap.hold is None:
                ending = await self._attempt(bootstrap)
                if not (ending.failed and bootstrap.restarts):
                    return ending
            found = await self._next
            if self._final is not None:
                return self._final
            assert found is not None
            self._next = self._loop.create_future()
            self._api.bridge.begin_again(self._api.bridge.cause)
            bootstrap = found

    async def _attempt(self, bootstrap: Bootstrap) -> Ending:
        self._api.watch.begin_attempt(bootstrap)
        self._guard = LeaderGuard(bootstrap, self._worker, self._supervisor, self._api)
        if self._final is not None:
            self._guard.end(self._final.cause, failed=self._final.failed)
        try:
            return await self._guard.run()
        finally:
            self._guard = None

    def _open_before_first_attempt(self, bootstrap: Bootstrap) -> bool:
        """Answer 503 before the first attempt. Return False if the port cannot be bound."""
        self._api.bridge.end(bootstrap.hold or "", failed=True)
        try:
            self._api.open()
        except ClusterError as error:
            node = bootstrap.assignment.nodes[0]
            self._supervisor.send(RankFailed(0, node, error.message))
            self._supervisor.send(RunEnded(error.message, failed=True))
            return False
        return True

    def _send_to_rank(self, message: Generate | Cancel) -> None:
        if self._guard is not None:
            self._guard.send_to_rank(message)

    def _log_access(self, line: str) -> None:
        node = self._bootstrap.assignment.nodes[0]
        self._supervisor.send(LogLine(0, node, "access", line))

    # --- supervisor -----------------------------------------------------------------------------

    def _end(self, ending: Ending) -> None:
        """End the attempt and the run."""
        if self._final is None:
            self._final = ending
        if not self._next.done():
            self._next.set_result(None)
        if self._guard is not None:
            self._guard.end(ending.cause, failed=ending.failed)

    async def _obey_supervisor(self) -> None:
        reason = "it closed the connection"
        try:
            async for message in self._supervisor.messages():
                self._heard_at = self._loop.time()
                match message:
                    case StopRun(cause=cause, failed=True) if self._will_restart():
                        assert self._guard is not None
                        self._guard.end(cause, failed=True)
                    case StopRun(cause=cause, failed=failed):
                        self._end(Ending(cause, failed))
                    case NextAttempt(bootstrap=bootstrap) if not self._next.done():
                        self._next.set_result(bootstrap)
                    case NamedKeys(keys=keys):
                        self._api.keys.replace(keys)
                    case _:
                        pass
        except ConnectionLost as error:
            reason = str(error)
        self._end(Ending(f"the launcher is gone: {reason}", failed=True))

    def _will_restart(self) -> bool:
        """Return True if the run continues after a failure of the current attempt."""
        return self._guard is not None and self._guard.bootstrap.restarts

    async def _watch_supervisor(self) -> None:
        deadlines = self._bootstrap.deadlines
        while True:
            self._supervisor.send(Heartbeat())
            await asyncio.sleep(deadlines.heartbeat_interval)
            if self._loop.time() - self._heard_at > deadlines.liveness:
                silence = f"it was silent for {deadlines.liveness:.0f} s"
                self._end(Ending(f"the launcher is gone: {silence}", failed=True))

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.append(task)
        task.add_done_callback(self._task_done)

    def _task_done(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            self._end(Ending(f"internal error: {type(error).__name__}: {error}", failed=True))
