"""The part common to all guards: start a rank, watch it, read its messages, end it.

``leader`` and ``follower`` add the process that each kind of guard reports to.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import traceback
from abc import ABC, abstractmethod
from collections.abc import Coroutine, Iterable
from dataclasses import dataclass
from typing import Any

from k2cli.agent import locks
from k2cli.errors import ClusterError, K2Error
from k2cli.guard.mpi_slot import MpiSlot
from k2cli.guard.rank_process import RankProcess, describe
from k2cli.guard.watchdog import NO_WORK, StallWatch
from k2cli.guard.work import WorkProbe
from k2cli.pauses import INTERVAL_SECONDS, PauseAwareClock
from k2cli.protocol import (
    Bootstrap,
    Fatal,
    GuardStarted,
    Heartbeat,
    LoadProgress,
    LogLine,
    RankFailed,
    RankMessage,
    RankStatus,
)
from k2cli.protocol.progress_page import Phase
from k2cli.protocol.wire import ConnectionLost
from k2cli.rdma_launches import SAFE_LAUNCHES, count_launch, launches_text
from k2cli.scratch import remove_scratch
from k2cli.system.awake import Awake

# A symptom, such as a lost peer or the end of mpirun, is reported after this time, so that another
# guard can report the cause first.
WEAK_CAUSE_SECONDS = 1.0
_RENEW_SECONDS = 15.0
_WORKING: tuple[Phase, ...] = (
    "loading", "checking", "warming up", "busy", "computing a new shape"
)  # fmt: skip
_RELEASE_SECONDS = 5.0
_AWAKE_SECONDS = 120.0
"""Time after the last request in which a Mac that no other machine needs stays awake."""


@dataclass(frozen=True, slots=True)
class Ending:
    """The reason for the end of a run. ``failed`` is False if the end was requested."""

    cause: str
    failed: bool


class Guard(ABC):
    """One guard and its rank.

    Args:
        bootstrap: assignment, secret and deadlines, from the launcher.
        worker: the module to run as the rank.
    """

    def __init__(self, bootstrap: Bootstrap, worker: str) -> None:
        self.bootstrap = bootstrap
        self.assignment = bootstrap.assignment
        self.deadlines = bootstrap.deadlines
        self.rank: RankProcess | None = None
        self._mpi_slot: MpiSlot | None = None
        self._worker = worker
        # When this rank, and any other, was last seen at work, by this clock.
        self._clock = PauseAwareClock()
        self._worked_at: float | None = None
        self._others_worked_at: float | None = None
        self._busy_at = self._clock.now()
        self._awake = Awake()
        self._reported_steps = 0
        self._shape = ""
        self._ending: asyncio.Future[Ending] = asyncio.get_running_loop().create_future()
        self._tasks: set[asyncio.Task[None]] = set()

    # --- defined by leader and follower ---------------------------------------------------------

    @abstractmethod
    def emit(self, event: Any) -> None:
        """Send an event towards the supervisor."""

    @abstractmethod
    def on_rank_message(self, message: RankMessage) -> None:
        """Handle a message from the rank other than Fatal."""

    # --- ending ---------------------------------------------------------------------------------

    @property
    def ending(self) -> bool:
        """True once the run is being ended."""
        return self._ending.done()

    def end(self, cause: str, *, failed: bool) -> None:
        """End the run. Later calls do not replace the first cause."""
        if not self._ending.done():
            self._ending.set_result(Ending(cause, failed))

    async def wait_for_ending(self) -> Ending:
        """Wait until the run has to end, and return the reason."""
        return await self._ending

    def fail(self, failure: RankFailed) -> None:
        """Report a failure and end the run."""
        if self.ending and not self._ending.result().failed:
            self.log(f"while stopping: rank {failure.rank}: {failure.cause}")
            return
        self.emit(failure)
        self.end(f"rank {failure.rank} on {failure.node} failed: {failure.cause}", failed=True)

    async def fail_unless_explained(self, failure: RankFailed) -> None:
        """Wait briefly for another cause to end the run, then report this failure."""
        if not self.ending:
            await asyncio.wait([self._ending], timeout=WEAK_CAUSE_SECONDS)
        self.fail(failure)

    def failure(self, cause: str, *, of_rank: bool = True) -> RankFailed:
        """Make the event for a failure of the rank, or of the guard itself."""
        rank = self.rank if of_rank else None
        return RankFailed(
            self.assignment.rank,
            self.assignment.nodes[self.assignment.rank],
            cause,
            exit_status=rank.exit_status if rank else None,
            last_lines=list(rank.last_lines) if rank else [],
        )

    def on_sigterm(self) -> None:
        """Fail the run: a user sent SIGTERM. A supervisor uses the connection instead."""
        failure = self.failure("its guard received SIGTERM", of_rank=False)
        self.spawn(self.fail_unless_explained(failure))

    # --- tasks ----------------------------------------------------------------------------------

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        """Run a task in the background. The run fails if the task raises."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._task_done)

    def _task_done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if task.cancelled() or (error := task.exception()) is None:
            return
        if not isinstance(error, K2Error):
            for line in "".join(traceback.format_exception(error)).splitlines():
                self.log(line)
        cause = error.message if isinstance(error, K2Error) else describe(error)
        self.fail(self.failure(cause, of_rank=False))

    def cancel_tasks(self) -> None:
        """Cancel all tasks that ``spawn`` started."""
        for task in list(self._tasks):
            task.cancel()

    # --- the rank -------------------------------------------------------------------------------

    def log(self, text: str) -> None:
        """Emit a log line of the guard itself."""
        self._log_line("guard", text)

    def _log_line(self, source: Any, text: str) -> None:
        rank = self.assignment.rank
        self.emit(LogLine(rank, self.assignment.nodes[rank], source, text))

    async def start_rank(self) -> bool:
        """Start the rank and the tasks that watch it. Return True if the rank runs."""
        job: dict[str, str] | None = None
        if self.assignment.transport == "mpi":
            job = await self._take_mpi_slot()
            if job is None:
                return False
        if self.assignment.transport == "jaccl":
            await asyncio.to_thread(self._count_rdma_launch)
        try:
            self.rank = await RankProcess.start(self.bootstrap, self._worker, job)
        except OSError as error:
            self.fail(self.failure(f"it cannot be started: {error}"))
            return False
        for work in (
            *(self._read_lines, self._read_messages, self._watch, self._send_heartbeats),
            self._wait_for_exit,
        ):
            self.spawn(work(self.rank))
        self.spawn(self._renew_lock())
        return True

    def _count_rdma_launch(self) -> None:
        """Count this launch on its node, and warn if later ones may need a restart of the node."""
        try:
            count = count_launch(self.assignment.run_id, self.bootstrap.attempt)
        except OSError as error:  # a full disk makes the count wrong, no more
            self.log(f"this launch over JACCL is not counted: {error}")
            return
        if count > SAFE_LAUNCHES:
            text = f"warning: {launches_text(count)}; restart the machine before the next launch"
            if self.bootstrap.restarts:
                text += "; each start by --restart on-failure is one more"
            self.log(text)

    async def _renew_lock(self) -> None:
        """Keep the lock fresh, so that other launches see that the run still uses this machine."""
        while not self.ending:
            with contextlib.suppress(OSError):  # no lock, or the lock of another user
                locks.keep_fresh(self.assignment.run_id)
            await asyncio.sleep(_RENEW_SECONDS)

    async def _take_mpi_slot(self) -> dict[str, str] | None:
        """Wait for mpirun's process on this node. Return None if it failed or the run ends."""
        self._mpi_slot = slot = MpiSlot(self.assignment.run_id, self.assignment.rank)
        taking = asyncio.ensure_future(slot.take())
        limit = self.deadlines.initialisation
        either: list[asyncio.Future[Any]] = [taking, self._ending]
        await asyncio.wait(either, timeout=limit, return_when=asyncio.FIRST_COMPLETED)
        if not taking.done():
            taking.cancel()
            if not self.ending:
                cause = f"mpirun did not start its process within {limit:.0f} s"
                self.fail(self.failure(cause, of_rank=False))
            return None
        try:
            job = taking.result()
        except ClusterError as error:
            self.fail(self.failure(error.message, of_rank=False))
            return None
        self.spawn(self._watch_mpi_slot(slot))
        return None if self.ending else job

    async def _watch_mpi_slot(self, slot: MpiSlot) -> None:
        await slot.lost.wait()
        if not self.ending:
            failure = self.failure("mpirun ended its process", of_rank=False)
            await self.fail_unless_explained(failure)

    def release_mpi(self, ending: Ending, *, in_reach: bool = True) -> None:
        """Release mpirun's process, and after a failure remove MPI's files on this node.

        Before the attempt is reported as ended: the next one may begin then, with new folders.

        Args:
            ending: the end of this attempt.
            in_reach: False if the leader's node, where mpirun runs, cannot be reached.
        """
        if self._mpi_slot is None:
            return
        self._mpi_slot.leave()
        if not in_reach:
            self._mpi_slot.end_daemons()
        if ending.failed:  # the supervisor may be gone, or unable to reach this node
            remove_scratch(self.assignment.run_id)

    async def release_lock(self, ending: Ending) -> None:
        """Release the lock on this node after a failure: the supervisor may be gone."""
        if ending.failed and not self.bootstrap.restarts:
            await release_lock(self.assignment.run_id)

    def started_event(self) -> GuardStarted:
        """Make the event that reports the process ids of guard and rank."""
        node = self.assignment.nodes[self.assignment.rank]
        rank_pid = self.rank.pid if self.rank is not None else 0
        return GuardStarted(self.assignment.rank, node, os.getpid(), rank_pid)

    def take_rank_status(self, rank: RankProcess) -> RankStatus:
        """Return the rank's progress and memory, and if it worked since the last call."""
        progress, mlx = rank.page.read(), rank.page.read_mlx()
        # A rank that is idle or waits counts steps too, and does no work.
        moved = progress.steps != self._reported_steps and progress.phase in _WORKING
        works = moved or self._worked_at is not None
        self._reported_steps, self._worked_at = progress.steps, None
        return RankStatus(
            self.assignment.rank,
            progress.steps,
            progress.phase,
            rank.resident_bytes,
            mlx.active_bytes,
            works,
            mlx.cached_bytes,
            mlx.peak_bytes,
        )

    def note_working(self, ranks: Iterable[int]) -> None:
        """Record that these ranks are at work: this guard's rank may be waiting for them."""
        if any(rank != self.assignment.rank for rank in ranks):
            self._others_worked_at = self._clock.now()

    async def _read_lines(self, rank: RankProcess) -> None:
        async for line in rank.lines():
            self._log_line("rank", line)

    async def _read_messages(self, rank: RankProcess) -> None:
        try:
            async for message in rank.messages():
                if isinstance(message, Fatal):
                    self._note_fatal(rank, message)
                else:
                    if isinstance(message, LoadProgress):
                        self._shape = message.shape
                    self.on_rank_message(message)
        except ConnectionLost as error:
            if "protocol" in str(error):
                self.log(f"the rank's last message is lost: {error}")
            # The exit status says more. But a rank that lives without its socket is useless.
            if not await rank.gone_within(WEAK_CAUSE_SECONDS) and not self.ending:
                rank.verdict = f"its connection to its guard broke: {error}"
                rank.kill()

    def _note_fatal(self, rank: RankProcess, fatal: Fatal) -> None:
        rank.fatal = fatal
        for line in fatal.traceback.splitlines():
            self._log_line("rank", line)

    async def _watch(self, rank: RankProcess) -> None:
        try:
            await self._watch_progress(rank)
        finally:
            self._awake.keep(wanted=False)

    def _stay_awake(self, phase: Phase, now: float) -> None:
        """Keep this machine awake while the rank works, or other machines need it.

        A run on several machines fails when one of them sleeps. A run on one machine goes on when
        it wakes up, so it may sleep between requests.
        """
        if phase in _WORKING:
            self._busy_at = now
        others = len(set(self.assignment.nodes)) > 1
        self._awake.keep(wanted=others or now - self._busy_at < _AWAKE_SECONDS)

    async def _watch_progress(self, rank: RankProcess) -> None:
        clock = self._clock
        watch = StallWatch(self.deadlines, clock)
        probe = WorkProbe(rank.pid, self.deadlines.work_interval)
        while rank.exit_status is None and not self.ending:
            await asyncio.sleep(INTERVAL_SECONDS)
            now, progress, work = clock.now(), rank.page.read(), NO_WORK
            self._stay_awake(progress.phase, now)
            if watch.still_seconds(now) < self.deadlines.work_interval:
                probe.forget()
            else:
                work = probe.look(now)
            if work.signs:
                self._worked_at = now
            if progress.phase in ("idle", "busy"):
                self._shape = ""  # the warm-up is over
            verdict = watch.observe(
                progress,
                stopped=rank.is_stopped(),
                work=work,
                others_worked_at=self._others_worked_at,
            )
            if verdict is not None and not self.ending:
                warming_up = progress.phase in ("warming up", "waiting") and self._shape
                rank.verdict = f"{verdict} (warm-up: {self._shape})" if warming_up else verdict
                rank.kill()
                return

    async def _send_heartbeats(self, rank: RankProcess) -> None:
        while rank.exit_status is None:
            rank.send(Heartbeat())
            await asyncio.sleep(self.deadlines.heartbeat_interval)

    async def _wait_for_exit(self, rank: RankProcess) -> None:
        await rank.wait()
        if self.ending:
            return
        failure = self.failure(rank.cause_of_exit())
        if rank.exit_is_symptom():
            await self.fail_unless_explained(failure)
        else:
            self.fail(failure)

    async def end_rank(self, ending: Ending) -> bool:
        """End the rank, with a grace period unless the run failed. Return True if it is gone."""
        if self.rank is None:
            return True
        grace_seconds = 0.0 if ending.failed else self.deadlines.stop_grace
        gone = await self.rank.end(grace_seconds=grace_seconds)
        if not gone:
            self.log(f"rank process {self.rank.pid} did not end after SIGKILL")
        return gone


async def release_lock(run_id: str, timeout_seconds: float = _RELEASE_SECONDS) -> None:
    """Release a run's lock on this machine, if the mutex of the locks can be had in time.

    A thread that waits for the mutex goes on waiting after the time limit: the process must end
    with ``os._exit``, which does not wait for threads.
    """
    with contextlib.suppress(OSError, TimeoutError):
        async with asyncio.timeout(timeout_seconds):
            await asyncio.to_thread(locks.release, run_id)
