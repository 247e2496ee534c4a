"""The supervisor of one run: starts its guards, follows their events, and ends what is left.

``k2 launch`` runs it in its own process; with ``--detach`` it is a process of its own,
``python -m k2cli.cluster.supervisor RUN_FOLDER``. It alone writes the run's record, and it does
not call a run ended before every node has confirmed that no process of it is left.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import Callable, Coroutine, Mapping
from pathlib import Path
from typing import Any

import msgspec
from msgspec.structs import replace

from k2cli.cluster.agent import RunProcess
from k2cli.cluster.journal import Journal
from k2cli.cluster.launchers import GuardCommand, direct_commands
from k2cli.cluster.locks import release_locks, renew_locks
from k2cli.cluster.mpi_start import prepare_mpirun
from k2cli.cluster.nodes import LocalNode, Node, node_named
from k2cli.cluster.outcome import Outcome, describe_exit, lost_connection
from k2cli.cluster.restarting import Attempts, renewed
from k2cli.cluster.runs import RunRecord, read_record
from k2cli.cluster.specification import RunSpecification, read_specification
from k2cli.errors import ClusterError, K2Error
from k2cli.runtime.protocol import (
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

Listener = Callable[[RunEvent], None]
# After the last event, the processes have this long to leave by themselves.
_EXIT_SECONDS = 2.0
_DRAIN_SECONDS = 2.0
# A guard that ends its attempt: the ranks' SIGTERM and SIGKILL, and the followers' word.
_GUARD_ENDS_SECONDS = 10.0
# Beyond the ranks' own grace: the guards' SIGTERM, SIGKILL and checks.
_STOP_MARGIN_SECONDS = 8.0
# Longer than this between two beats, and it was this process that did not run.
_OWN_PAUSE_SECONDS = 3.0
_encoder = msgspec.json.Encoder()
_decoder: msgspec.json.Decoder[RunEvent] = msgspec.json.Decoder(RunEvent)


class Supervisor:
    """One run, from its specification to its end.

    Args:
        specification: what to start.
        record: the run's record as prepared.
        listener: hears every event but heartbeats, in order.
    """

    def __init__(
        self, specification: RunSpecification, record: RunRecord, listener: Listener
    ) -> None:
        self._specification = specification
        self._deadlines = specification.deadlines
        self._nodes = {name: node_named(name) for name in specification.nodes}
        self._journal = Journal(record)
        self._listener = listener
        self._loop = asyncio.get_running_loop()
        self._over: asyncio.Future[Outcome] = self._loop.create_future()
        self._processes: list[tuple[GuardCommand, asyncio.subprocess.Process]] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._heard_at: float | None = None
        self._stop_cause: str | None = None
        self._stop_asked = asyncio.Event()
        self._root: RankFailed | None = None
        # What became of mpirun or of a node, seen from here.
        self._witnessed: Outcome | None = None
        self._bootstraps = specification.bootstraps
        self._attempts = Attempts(specification.restart)
        self._number = 1
        self._leader: tuple[GuardCommand, asyncio.subprocess.Process] | None = None
        # Of the leader's guard: it has ended its attempt, and every rank with it.
        self._guard_ended = asyncio.Event()
        self._started_at = self._loop.time()
        self._ready_at: float | None = None
        self._tasks_started = False

    # --- from outside ---------------------------------------------------------------------------

    def stop(self, cause: str) -> None:
        """End the run in good order; a second call is the same as the first."""
        if self._stop_cause is not None:
            return
        self._stop_cause = cause
        self._stop_asked.set()
        self._journal.set_state("stopping", cause)
        self._tell(StopRun(cause))
        limit = self._deadlines.stop_grace + _STOP_MARGIN_SECONDS
        self._loop.call_later(limit, self._finish, Outcome.stopped(cause, wait=False))

    @property
    def stopping(self) -> bool:
        """Whether ``stop`` was called."""
        return self._stop_cause is not None

    def force(self) -> None:
        """Do not wait for anybody: SIGKILL everything now."""
        self._finish(Outcome.stopped(self._stop_cause or "forced", wait=False))

    async def run(self) -> RunRecord:
        """Carry the run to its end, over as many attempts as its restart policy allows.

        Returns:
            The final record: ``stopped`` or ``failed``, with every process gone, or with the
            cause saying what could not be ended.
        """
        self._journal.take_over()
        await asyncio.to_thread(self._renew_locks)
        while True:
            outcome = self._settle(await self._attempt())
            delay = self._delay_after(outcome)
            if delay is None:
                break
            await self._pause(outcome, delay)
            if self._stop_cause is not None:
                outcome = Outcome.stopped(self._stop_cause)
                break
        if outcome.has_failed and self._attempts.failures > 1:
            outcome = outcome.after(self._attempts.failures, self._attempts.first_cause)
        left = await self._end_everything(outcome)
        await asyncio.to_thread(self._release_locks, left)
        return self._journal.close(outcome, left)

    # --- attempts -------------------------------------------------------------------------------

    async def _attempt(self) -> Outcome:
        self._over = self._loop.create_future()
        self._root, self._witnessed, self._ready_at = None, None, None
        self._guard_ended.clear()
        try:
            await self._start()
            return await self._over
        except ClusterError as error:
            outcome = Outcome.failed(error.message, wait=False)
            self._finish(outcome)
            return outcome

    def _delay_after(self, outcome: Outcome) -> float | None:
        if not outcome.has_failed or self._stop_cause is not None:
            return None
        served = self._loop.time() - self._ready_at if self._ready_at is not None else 0.0
        return self._attempts.failed(outcome.cause, served)

    async def _pause(self, outcome: Outcome, delay_seconds: float) -> None:
        """Clear what is left of an attempt, and wait, while the API says why it does not answer."""
        number = self._number + 1
        event = RunRestarting(outcome.cause, number, delay_seconds)
        self._journal.restarting(event, outcome.failure)
        self._listener(event)
        kept = await self._keep_leader(outcome)
        await self._kill_others(kept)
        self._number = number
        try:
            await asyncio.to_thread(self._renew, outcome.cause, kept=kept)
            if not kept:
                await self._start_leader()
        except ClusterError as error:
            self._journal.say(f"between attempts: {error.message}")
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._stop_asked.wait(), delay_seconds)

    async def _keep_leader(self, outcome: Outcome) -> bool:
        """Whether the leader's guard has ended its attempt in good order and goes on."""
        if self._leader is None or not outcome.wait:
            return False
        if not self._guard_ended.is_set():
            self._tell(StopRun(outcome.cause, failed=True))
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._guard_ended.wait(), _GUARD_ENDS_SECONDS)
        return self._guard_ended.is_set() and self._leader[1].returncode is None

    async def _kill_others(self, kept: bool) -> None:
        """End what is left of an attempt on every node, but for a leader's guard that is kept."""
        leader = self._leader if kept else None
        self._kill_own(spared=leader)
        spared = self._journal.record.ranks[0].guard_pid if kept else None
        await asyncio.gather(*(self._clear(node, spared) for node in self._nodes.values()))
        self._processes = [leader] if leader is not None else []
        self._leader = leader

    def _renew(self, cause: str, *, kept: bool) -> None:
        """New secret and ports for the next attempt."""
        url = self._journal.record.url
        self._bootstraps = renewed(
            self._bootstraps,
            lambda name, count: self._nodes[name].free_ports(count),
            http_port=int(url.rpartition(":")[2]) if url else None,
        )
        if not kept:
            self._write_bootstrap(0, replace(self._bootstraps[0], hold=cause))
        self._renew_locks()

    async def _start_leader(self) -> None:
        """The leader's guard alone, to answer for the run until the next attempt."""
        command = self._guards()[0]
        await self._start_process(command, leads=True)

    # --- start ----------------------------------------------------------------------------------

    async def _start(self) -> None:
        ranks = range(len(self._bootstraps))
        goes_on = self._leader is not None and self._leader[1].returncode is None
        if self._number > 1 and not goes_on:
            self._leader, self._processes = None, []
        await asyncio.gather(
            *(
                asyncio.to_thread(self._write_bootstrap, rank, self._bootstraps[rank])
                for rank in ranks
                if rank > 0 or not goes_on
            )
        )
        self._started_at = self._loop.time()
        if goes_on:
            self._tell(NextAttempt(self._bootstraps[0]))
        else:
            self._heard_at = None
        for command in self._guards()[int(goes_on) :]:
            await self._start_process(command, leads=0 in command.ranks)
        if self._specification.backend == "mpi" and self._specification.scratch is not None:
            await self._start_mpirun(Path(self._specification.scratch))
        if self._stop_cause is not None:
            self._tell(StopRun(self._stop_cause))
        if not self._tasks_started:
            self._tasks_started = True
            self._spawn(self._beat())
            self._spawn(self._listen_for_silence())

    def _write_bootstrap(self, rank: int, bootstrap: Bootstrap) -> None:
        node = self._nodes[self._specification.nodes[rank]]
        name = f"bootstrap-{rank}.json"
        node.write_file(self._specification.run_id, name, _encoder.encode(bootstrap))

    def _guards(self) -> list[GuardCommand]:
        specification = self._specification
        nodes = [self._nodes[name] for name in specification.nodes]
        return direct_commands(specification.run_id, nodes, specification.worker)

    async def _start_mpirun(self, scratch: Path) -> None:
        specification = self._specification
        nodes = [self._nodes[name] for name in specification.nodes]
        remote = not all(node.is_local for node in nodes)
        command, environment = await asyncio.to_thread(
            prepare_mpirun,
            specification.run_id,
            nodes,
            scratch,
            networks=specification.networks,
            prefixes=specification.mpi_prefixes if remote else None,
        )
        await self._start_process(command, environment)

    async def _start_process(
        self,
        command: GuardCommand,
        environment: Mapping[str, str] | None = None,
        *,
        leads: bool = False,
    ) -> None:
        node = self._nodes[command.node] if command.ranks else LocalNode()
        process = await node.start(command.arguments, environment)
        self._processes.append((command, process))
        if leads:
            self._leader = (command, process)
        self._watch(command, process, leads=leads)

    def _watch(
        self, command: GuardCommand, process: asyncio.subprocess.Process, *, leads: bool
    ) -> None:
        assert process.stdout is not None
        assert process.stderr is not None
        output = self._read_events if leads else self._read_noise
        readers = [
            asyncio.create_task(output(command, process.stdout)),
            asyncio.create_task(self._read_noise(command, process.stderr)),
        ]
        if not command.ranks and process.stdin is not None:
            # A guard's stays open as long as this process lives: its sign that somebody does.
            process.stdin.close()
        self._spawn(self._await_exit(command, process, readers, None if leads else self._over))

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._task_done)

    def _task_done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._finish(Outcome.failed(f"internal error: {type(error).__name__}: {error}"))

    # --- the conversation with the leader's guard -----------------------------------------------

    def _tell(self, message: Heartbeat | StopRun | NextAttempt) -> None:
        if self._leader and (stdin := self._leader[1].stdin) and not stdin.is_closing():
            stdin.write(_encoder.encode(message) + b"\n")

    async def _beat(self) -> None:
        while True:
            self._tell(Heartbeat())
            await asyncio.sleep(self._deadlines.heartbeat_interval)

    async def _listen_for_silence(self) -> None:
        """The leader's guard sends a heartbeat a second; one that does not is as good as gone."""
        looked_at = self._loop.time()
        while True:
            await asyncio.sleep(0.25)
            now = self._loop.time()
            if now - looked_at > _OWN_PAUSE_SECONDS:
                self._started_at = now
                self._heard_at = now if self._heard_at is not None else None
            looked_at = now
            if self._heard_at is None:
                limit, since = self._deadlines.initialisation, self._started_at
            else:
                limit, since = self._deadlines.liveness, self._heard_at
            if now - since > limit and not self._over.done():
                cause = f"its guard was silent for {limit:.0f} s"
                node = self._specification.nodes[0]
                self._finish(Outcome.failed(cause, rank=0, node=node, wait=False))

    async def _read_events(self, command: GuardCommand, stream: asyncio.StreamReader) -> None:
        with contextlib.suppress(ValueError):  # a line beyond the stream's limit: not ours
            while line := await stream.readline():
                try:
                    event = _decoder.decode(line)
                except msgspec.MsgspecError:
                    self._journal.log_line(command, line)
                    continue
                self._heard_at = self._loop.time()
                if not isinstance(event, Heartbeat):
                    self._handle(event)

    async def _read_noise(self, command: GuardCommand, stream: asyncio.StreamReader) -> None:
        with contextlib.suppress(ValueError):
            while line := await stream.readline():
                # mpirun explains at length that guards ended without MPI: they never used it.
                if not (self._over.done() and command.program == "mpirun"):
                    self._journal.log_line(command, line)

    def _handle(self, event: RunEvent) -> None:
        match event:
            case RankFailed() if self._root is None and not self.stopping:
                self._root = event
            case RunEnded(cause=cause, failed=failed):
                self._guard_ended.set()
                ended = Outcome.failed(cause) if failed else Outcome.stopped(cause)
                self._finish(ended)
            case RunReady() if self.stopping:
                return
            case RunReady():
                self._ready_at = self._loop.time()
        self._journal.note(event)
        self._listener(event)

    # --- the end --------------------------------------------------------------------------------

    def _finish(self, outcome: Outcome) -> None:
        if not self._over.done():
            self._over.set_result(outcome)

    async def _await_exit(
        self,
        command: GuardCommand,
        process: asyncio.subprocess.Process,
        readers: list[asyncio.Task[None]],
        attempt: asyncio.Future[Outcome] | None,
    ) -> None:
        """Take the end of a process for that of its attempt; the leader's guard has no one."""
        status = await process.wait()
        over = attempt if attempt is not None else self._over
        if not over.done():
            self._note_exit(command, status)
        # What it said last may explain it; a grandchild may hold the pipe open for longer.
        await asyncio.wait(readers, timeout=_DRAIN_SECONDS)
        if 0 not in command.ranks:
            # The guard of rank 0 sees the loss too, and knows more.
            await asyncio.sleep(_DRAIN_SECONDS)
        if not over.done():
            over.set_result(self._outcome_of_exit(command, status))

    def _note_exit(self, command: GuardCommand, status: int) -> None:
        """Keep an exit that explains what other ranks report of it."""
        mpirun_killed = command.program == "mpirun" and status < 0
        node_lost = lost_connection(command, status) and self._root is None
        if mpirun_killed or node_lost:
            self._witnessed = self._witnessed or self._outcome_of_exit(command, status)

    def _outcome_of_exit(self, command: GuardCommand, status: int) -> Outcome:
        if self._stop_cause is not None:
            return Outcome.stopped(self._stop_cause)
        last_lines = self._journal.last_lines(command)
        rank = command.ranks[0] if command.ranks else None
        return Outcome.failed(
            describe_exit(command, status),
            rank=rank,
            node=self._specification.nodes[rank] if rank is not None else None,
            exit_status=status,
            last_lines=last_lines,
        )

    def _settle(self, outcome: Outcome) -> Outcome:
        """Prefer what the user asked for, then the first failure that a guard has reported."""
        if self._stop_cause is not None:
            return Outcome.stopped(self._stop_cause)
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

    async def _end_everything(self, outcome: Outcome) -> dict[str, str]:
        """Give the processes a moment, then end them; returns what could not be ended, by node."""
        self._journal.set_state("stopping", outcome.cause)
        if self._specification.restart.mode != "never":
            self._tell(StopRun(outcome.cause, outcome.has_failed))
        if self._processes and outcome.wait:
            waits = [asyncio.create_task(process.wait()) for _, process in self._processes]
            _, pending = await asyncio.wait(waits, timeout=_EXIT_SECONDS)
            for wait in pending:
                wait.cancel()
        self._kill_own()
        results = await asyncio.gather(*(self._clear(node) for node in self._nodes.values()))
        await self._stop_tasks()
        return {
            name: problem for name, problem in zip(self._nodes, results, strict=True) if problem
        }

    def _kill_own(self, spared: tuple[GuardCommand, Any] | None = None) -> None:
        """SIGKILL the sessions that this process has started."""
        for started in self._processes:
            process = started[1]
            if process.returncode is None and (spared is None or process is not spared[1]):
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)

    async def _clear(self, node: Node, spared: int | None = None) -> str:
        """End what is left of the run on a node and check it; returns what is wrong, or nothing.

        ``spared`` is the process id of the leader's guard, if that stays.
        """
        run_id = self._specification.run_id
        name = self._specification.nodes[0]
        kept = [str(spared)] if spared is not None and node is self._nodes[name] else []
        try:
            left: list[RunProcess] = await asyncio.to_thread(
                node.ask, list[RunProcess], "kill", run_id, *kept
            )
            await asyncio.to_thread(node.remove_bootstraps, run_id)
        except ClusterError as error:
            return error.message
        return ", ".join(f"process {process.pid} could not be ended" for process in left)

    # --- locks ----------------------------------------------------------------------------------

    def _renew_locks(self) -> None:
        """Say on every node that it is this process now that has them, and that it lives."""
        if self._specification.locked:
            renew_locks(list(self._nodes.values()), self._specification.run_id)

    def _release_locks(self, left: Mapping[str, str]) -> None:
        """But where something is ``left``: such a node is out of reach, or not yet another's."""
        if self._specification.locked:
            nodes = [node for name, node in self._nodes.items() if name not in left]
            release_locks(nodes, self._specification.run_id)

    async def _stop_tasks(self) -> None:
        for task in self._tasks:
            task.cancel()
        for _, process in self._processes:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(process.wait(), _DRAIN_SECONDS)


# --- as a process, or inside one ----------------------------------------------------------------


async def _supervise(
    folder: Path, listener: Listener, interrupts: Callable[[Supervisor], None]
) -> RunRecord:
    record = read_record(folder)
    if record is None:
        raise ClusterError(f"{folder} holds no run")
    supervisor = Supervisor(read_specification(folder), record, listener)
    interrupts(supervisor)
    return await supervisor.run()


def supervise(
    folder: Path, listener: Listener, on_interrupt: Callable[[bool], None] | None = None
) -> RunRecord:
    """Run a prepared run to its end in this process, and obey this process's signals meanwhile.

    SIGTERM and SIGHUP stop the run in good order. So does the first SIGINT, if ``on_interrupt`` is
    given; the second SIGINT does not wait.

    Args:
        folder: the run's folder.
        listener: hears every event of the run but heartbeats.
        on_interrupt: called at each SIGINT, with whether it is the first. None ignores SIGINT.

    Returns:
        The final record.
    """

    def install(supervisor: Supervisor) -> None:
        loop = asyncio.get_running_loop()

        def interrupted() -> None:
            first = not supervisor.stopping
            if on_interrupt is not None:
                on_interrupt(first)
            if first:
                supervisor.stop("interrupted")
            else:
                supervisor.force()

        if on_interrupt is not None:
            loop.add_signal_handler(signal.SIGINT, interrupted)
        else:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        loop.add_signal_handler(signal.SIGTERM, supervisor.stop, "stopped")
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
            loop.add_signal_handler(signal.SIGHUP, supervisor.stop, "the terminal was closed")
        # Ctrl-Z would look like a launcher that died.
        signal.signal(signal.SIGTSTP, signal.SIG_IGN)

    return asyncio.run(_supervise(folder, listener, install))


def main() -> None:
    """Be the supervisor that ``launch --detach`` leaves behind."""
    try:
        record = supervise(Path(sys.argv[1]), lambda event: None)
    except K2Error as error:
        sys.stderr.write(f"{error.message}\n")
        sys.exit(error.exit_code)
    sys.exit(ClusterError.exit_code if record.state == "failed" else 0)


if __name__ == "__main__":
    main()
