"""The supervisor of one run: it carries out all attempts, and kills the processes that remain.

``k2 launch`` runs it in its own process; with ``--detach`` it is a process of its own,
``python -m k2cli.supervisor.supervisor RUN_FOLDER``. Only the supervisor writes the run's record. A
run ends after every node that can be reached has confirmed that no process of it is left.
"""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import sys
from collections.abc import Callable, Coroutine, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
from msgspec.structs import replace

from k2cli import event_loop
from k2cli.cluster.node_lookup import node_named
from k2cli.errors import ClusterError, K2Error
from k2cli.launch.guard_commands import GuardCommand, direct_commands
from k2cli.launch.mpi import Mpirun, prepare_mpirun
from k2cli.launch.restart_policy import Attempts
from k2cli.launch.specification import RunSpecification, read_specification, renew_bootstraps
from k2cli.nodes.local import LocalNode
from k2cli.nodes.locks import release_locks, renew_locks
from k2cli.nodes.node import LOCALHOST
from k2cli.protocol import (
    Bootstrap,
    Heartbeat,
    NextAttempt,
    RankFailed,
    RunEnded,
    RunEvent,
    RunReady,
    RunRestarting,
    StopRun,
)
from k2cli.runs.hand_over import deciding
from k2cli.runs.record import Listener, RunRecord, read_record
from k2cli.stderr import say_on_stderr
from k2cli.supervisor.attempt import Attempt
from k2cli.supervisor.end_processes import RunKiller
from k2cli.supervisor.heartbeats import Heartbeats
from k2cli.supervisor.in_threads import all_in_threads
from k2cli.supervisor.journal import Journal
from k2cli.supervisor.key_watch import KeyWatch
from k2cli.supervisor.lease_watch import LeaseWatch
from k2cli.supervisor.outcome import Outcome
from k2cli.supervisor.processes import Processes
from k2cli.supervisor.signals import obey_signals
from k2cli.system.awake import kept_awake

# The time that the leader's guard has to end its attempt: SIGTERM and SIGKILL of all ranks.
_GUARD_ENDS_SECONDS = 10.0
# The time that guards need after the ranks' own grace, for SIGTERM, SIGKILL and checks.
_STOP_MARGIN_SECONDS = 8.0
_encoder = msgspec.json.Encoder()


class Supervisor:
    """The supervisor of one run.

    Args:
        specification: the guards to start.
        record: the record as prepared by the launch.
        listener: receives every event except heartbeats, in order.
    """

    def __init__(
        self, specification: RunSpecification, record: RunRecord, listener: Listener
    ) -> None:
        self._specification = specification
        self._deadlines = specification.deadlines
        self._nodes = {name: node_named(name) for name in specification.nodes}
        self._journal = Journal(record, listener)
        self._tasks: set[asyncio.Task[None]] = set()
        self._stop_cause: str | None = None
        self._stop_asked = asyncio.Event()
        self._bootstraps = specification.bootstraps
        self._attempts = Attempts(specification.restart)
        self._mpirun: Mpirun | None = None
        self._number = 1
        self._attempt = self._new_attempt()
        self._processes = Processes(
            self._journal, self._handle_event, lambda: self._attempt, self._spawn
        )
        self._heartbeats = Heartbeats(self._deadlines, self._processes.tell, self._silent)
        self._keys = KeyWatch(specification.named_keys, self._processes.tell, self._journal.say)
        self._leases = LeaseWatch(
            record.folder,
            cause=specification.lease_cause,
            stop=self.stop,
            say=self._journal.say,
        )
        self._tasks_started = False

    def take_over(self) -> None:
        """Make this process the supervisor in the run's record."""
        self._journal.take_over()

    # --- requests of the user -------------------------------------------------------------------

    def stop(self, cause: str) -> None:
        """Ask the ranks to end; only the first call has an effect."""
        if self._stop_cause is not None:
            return
        self._stop_cause = cause
        self._stop_asked.set()
        self._journal.set_state("stopping", cause)
        self._processes.tell(StopRun(cause))
        limit = self._deadlines.stop_grace + _STOP_MARGIN_SECONDS
        asyncio.get_running_loop().call_later(limit, self._finish, Outcome.stopped(cause))

    @property
    def stopping(self) -> bool:
        """True if ``stop`` was called."""
        return self._stop_cause is not None

    def force(self) -> None:
        """SIGKILL all processes now, without waiting."""
        self._finish(Outcome.stopped(self._stop_cause or "forced"))
        self._processes.kill()

    async def run(self) -> RunRecord:
        """Carry out the run, with as many attempts as its restart policy allows.

        Returns:
            The final record: ``stopped`` or ``failed``. Its cause names the processes that could
            not be killed, if any.
        """
        async with self._journal.kept():
            try:
                outcome = await self._all_attempts()
            except Exception as error:
                outcome = self._journal.note_bug(error)
            left = await self._end_everything(outcome)
            await asyncio.to_thread(self._release_locks, left)
            return self._journal.close(outcome, left)

    async def _all_attempts(self) -> Outcome:
        await asyncio.to_thread(self._renew_locks)
        while True:
            outcome = await self._try_once()
            delay = self._delay_after(outcome)
            if delay is None:
                break
            await self._pause(outcome, delay)
            if self._stop_cause is not None:
                return Outcome.stopped(self._stop_cause)
            self._attempt = self._new_attempt()
        if outcome.has_failed and self._attempts.failures > 1:
            return outcome.after(self._attempts.failures, self._attempts.first_cause)
        return outcome

    # --- attempts -------------------------------------------------------------------------------

    def _new_attempt(self) -> Attempt:
        return Attempt(self._specification.nodes, self._journal)

    async def _try_once(self) -> Outcome:
        """Carry out one attempt; if the user stopped the run, that is its outcome."""
        try:
            await self._start()
        except ClusterError as error:
            self._finish(Outcome.failed(error.message, wait=False))
        outcome = await self._attempt.outcome()
        return outcome if self._stop_cause is None else Outcome.stopped(self._stop_cause)

    def _delay_after(self, outcome: Outcome) -> float | None:
        if not outcome.has_failed or self._stop_cause is not None:
            return None
        return self._attempts.failed(outcome.cause, self._attempt.served_seconds)

    async def _pause(self, outcome: Outcome, delay_seconds: float) -> None:
        """Kill the rest of an attempt, and wait; meanwhile the API answers with the cause."""
        number = self._number + 1
        event = RunRestarting(outcome.cause, number, delay_seconds)
        self._journal.note_restart(event, outcome.failure)
        kept = await self._keep_leader(outcome)
        await self._kill_others(kept)
        self._number = number
        try:
            await asyncio.to_thread(self._renew, outcome.cause, kept=kept)
            if not kept:
                await self._start_process(self._guards()[0])
                self._keys.tell()
        except ClusterError as error:
            self._journal.say(f"preparing the next attempt failed: {error.message}")
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._stop_asked.wait(), delay_seconds)

    async def _keep_leader(self, outcome: Outcome) -> bool:
        """True if the leader's guard has ended its attempt by itself and can be used again."""
        if not self._processes.leader_lives or not outcome.wait:
            return False
        ended = self._attempt.guard_ended
        if not ended.is_set():
            self._processes.tell(StopRun(outcome.cause, failed=True))
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(ended.wait(), _GUARD_ENDS_SECONDS)
        return ended.is_set() and self._processes.leader_lives

    async def _kill_others(self, kept: bool) -> None:
        """Kill the processes of an attempt on all nodes, except a leader's guard that is kept."""
        killer = RunKiller(self._specification.run_id, self._nodes)
        answered = self._processes.nodes_without_guards()
        self._processes.kill(spare_leader=kept)
        pid = self._journal.record.ranks[0].guard_pid if kept else None
        spared = {self._specification.nodes[0]: pid} if pid is not None else {}
        await killer.kill(answered=answered, spared=spared)
        self._processes.forget(keep_leader=kept)

    def _renew(self, cause: str, *, kept: bool) -> None:
        """Make the bootstraps of the next attempt."""
        url = self._journal.record.url
        self._bootstraps = renew_bootstraps(
            self._bootstraps,
            lambda name, count: self._nodes[name].free_ports(count),
            http_port=int(url.rpartition(":")[2]) if url else None,
        )
        if not kept:
            # A new leader's guard answers the API's requests until the next attempt.
            self._write_bootstrap(0, replace(self._bootstraps[0], hold=cause))
        self._renew_locks()

    # --- start ----------------------------------------------------------------------------------

    async def _start(self) -> None:
        goes_on = self._processes.leader_lives
        if not goes_on:
            await self._read_keys()
            self._processes.forget()
        await all_in_threads(
            self._prepare_mpirun,
            *(
                partial(self._write_bootstrap, rank, bootstrap)
                for rank, bootstrap in enumerate(self._bootstraps)
                if rank > 0 or not goes_on
            ),
        )
        self._heartbeats.started(anew=not goes_on)
        if goes_on:
            self._processes.tell(NextAttempt(self._bootstraps[0]))
        for command in self._guards()[int(goes_on) :]:
            await self._start_process(command)
        if not goes_on:
            self._keys.tell()
        if (mpirun := self._mpirun) is not None:
            await self._processes.start(LocalNode(), mpirun.command, mpirun.environment)
        if self._stop_cause is not None:
            self._processes.tell(StopRun(self._stop_cause))
        if not self._tasks_started:
            self._tasks_started = True
            self._spawn(self._heartbeats.send())
            self._spawn(self._heartbeats.watch())
            self._spawn(self._keys.follow())
            self._spawn(self._leases.follow())

    async def _read_keys(self) -> None:
        """Read the named keys before the first attempt.

        Raises:
            ClusterError: if they cannot be read.
        """
        try:
            await asyncio.to_thread(self._keys.read)
        except K2Error as error:
            raise ClusterError(error.message, error.hint) from error

    def _write_bootstrap(self, rank: int, bootstrap: Bootstrap) -> None:
        node = self._nodes[self._specification.nodes[rank]]
        name = f"bootstrap-{rank}.json"
        if bootstrap.http is not None:
            bootstrap = replace(bootstrap, http=replace(bootstrap.http, keys=self._keys.keys))
        node.write_file(self._specification.run_id, name, _encoder.encode(bootstrap))

    def _guards(self) -> list[GuardCommand]:
        specification = self._specification
        nodes = [self._nodes[name] for name in specification.nodes]
        return direct_commands(specification.run_id, nodes, specification.worker)

    async def _start_process(self, guard: GuardCommand) -> None:
        await self._processes.start(self._nodes[guard.node], guard)

    def _prepare_mpirun(self) -> None:
        """Prepare the attempt's mpirun, if its transport needs one, in folders of its own."""
        specification = self._specification
        if specification.transport != "mpi":
            return
        if self._mpirun is not None:  # this machine may be none of the run's nodes
            shutil.rmtree(self._mpirun.scratch, ignore_errors=True)
        nodes = [self._nodes[name] for name in specification.nodes]
        remote = not all(node.is_local for node in nodes)
        self._mpirun = prepare_mpirun(
            specification.run_id,
            nodes,
            networks=specification.networks,
            prefixes=specification.mpi_prefixes if remote else None,
        )

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._task_done)
        return task

    def _task_done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._finish(self._journal.note_bug(error))

    # --- events of the leader's guard -----------------------------------------------------------

    def _silent(self, limit_seconds: float) -> None:
        cause = f"its guard was silent for {limit_seconds:.0f} s"
        node = self._specification.nodes[0]
        self._finish(Outcome.failed(cause, rank=0, node=node, wait=False))

    def _handle_event(self, event: RunEvent) -> None:
        self._heartbeats.heard()
        match event:
            case Heartbeat():
                return
            case RankFailed() if not self.stopping:
                self._attempt.rank_failed(event)
            case RunEnded(cause=cause, failed=failed):
                self._attempt.guard_ended.set()
                self._finish(Outcome.failed(cause) if failed else Outcome.stopped(cause))
            case RunReady() if self.stopping:
                return
            case RunReady():
                self._attempt.ready()
        self._journal.note(event)

    # --- the end --------------------------------------------------------------------------------

    def _finish(self, outcome: Outcome) -> None:
        self._attempt.finish(outcome)

    async def _end_everything(self, outcome: Outcome) -> dict[str, str]:
        """Kill the processes that do not exit in time; return the problems, by node."""
        self._journal.set_state("stopping", outcome.cause)
        if self._specification.restart.mode != "never":
            self._processes.tell(StopRun(outcome.cause, outcome.has_failed))
        killer = RunKiller(self._specification.run_id, self._nodes)
        if outcome.wait:
            await self._processes.wait_for_exit()
        answered = self._processes.nodes_without_guards()
        self._processes.kill()
        left = await killer.kill(answered=answered)
        for task in self._tasks:
            task.cancel()
        await self._processes.reap()
        return left

    # --- locks ----------------------------------------------------------------------------------

    def _renew_locks(self) -> None:
        """Make this process the holder of the locks, and show that it lives."""
        if self._specification.locked:
            renew_locks(list(self._nodes.values()), self._specification.run_id)

    def _release_locks(self, left: Mapping[str, str]) -> None:
        """Release the locks on all nodes except those where processes may still be alive."""
        if self._specification.locked:
            nodes = [node for name, node in self._nodes.items() if name not in left]
            release_locks(nodes, self._specification.run_id)


# --- the process --------------------------------------------------------------------------------


async def _supervise(
    folder: Path, listener: Listener, on_interrupt: Callable[[bool], None] | None
) -> RunRecord:
    with deciding(folder):
        record = read_record(folder)
        if record is None:
            raise ClusterError(f"{folder} contains no run")
        if not record.live:  # ``k2 stop`` came first, or its launcher was found dead
            raise ClusterError(f"{record.run_id} is over: {record.state}")
        specification = read_specification(folder)
        supervisor = Supervisor(specification, record, listener)
        supervisor.take_over()
    obey_signals(supervisor.stop, supervisor.force, lambda: supervisor.stopping, on_interrupt)
    with contextlib.ExitStack() as kept:
        # Guards on other nodes end a run whose supervisor sleeps; here they do what is needed.
        if any(name != LOCALHOST for name in specification.nodes):
            kept.enter_context(kept_awake())
        return await supervisor.run()


def supervise(
    folder: Path, listener: Listener, on_interrupt: Callable[[bool], None] | None = None
) -> RunRecord:
    """Supervise a prepared run in this process until it ends, and handle signals.

    Args:
        folder: the run's folder.
        listener: receives every event of the run except heartbeats.
        on_interrupt: called at each Ctrl-C, with True at the first; None ignores Ctrl-C.

    Returns:
        The final record.
    """
    return event_loop.run(_supervise(folder, listener, on_interrupt))


def main() -> None:
    """Run the supervisor that ``launch --detach`` starts in the background."""
    try:
        record = supervise(Path(sys.argv[1]), lambda event: None)
    except K2Error as error:
        say_on_stderr(error.message)
        sys.exit(error.exit_code)
    sys.exit(ClusterError.exit_code if record.state == "failed" else 0)


if __name__ == "__main__":
    main()
