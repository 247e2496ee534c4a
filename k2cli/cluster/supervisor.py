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
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import msgspec

from k2cli.cluster.journal import Journal
from k2cli.cluster.launchers import GuardCommand, direct_commands, mpi_commands
from k2cli.cluster.nodes import Node, node_named
from k2cli.cluster.openmpi import find_openmpi
from k2cli.cluster.outcome import Outcome, describe_exit, rank_to_blame
from k2cli.cluster.runs import RunRecord, read_record
from k2cli.cluster.specification import RunSpecification, read_specification
from k2cli.errors import ClusterError, K2Error
from k2cli.runtime.protocol import Heartbeat, RankFailed, RunEnded, RunEvent, RunReady, StopRun

Listener = Callable[[RunEvent], None]
# After the last event, the processes have this long to leave by themselves.
_EXIT_SECONDS = 2.0
_DRAIN_SECONDS = 2.0
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
        self._root: RankFailed | None = None

    # --- from outside ---------------------------------------------------------------------------

    def stop(self, cause: str) -> None:
        """End the run in good order; a second call is the same as the first."""
        if self._stop_cause is not None:
            return
        self._stop_cause = cause
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
        """Carry the run to its end.

        Returns:
            The final record: ``stopped`` or ``failed``, with every process gone, or with the
            cause saying what could not be ended.
        """
        self._journal.take_over()
        try:
            await self._start()
            outcome = await self._over
        except ClusterError as error:
            outcome = Outcome.failed(error.message, wait=False)
        left = await self._end_everything(outcome)
        outcome = self._settle(outcome)
        return self._journal.close(outcome, left)

    # --- start ----------------------------------------------------------------------------------

    async def _start(self) -> None:
        specification = self._specification
        for rank, name in enumerate(specification.nodes):
            content = _encoder.encode(specification.bootstraps[rank])
            await asyncio.to_thread(
                self._nodes[name].write_file,
                specification.run_id,
                f"bootstrap-{rank}.json",
                content,
            )
        for command in self._commands():
            process = await self._nodes[command.node].start(command.arguments)
            self._processes.append((command, process))
            self._watch(command, process, leads=0 in command.ranks)
        if self._stop_cause is not None:
            self._tell(StopRun(self._stop_cause))
        self._spawn(self._beat())
        self._spawn(self._listen_for_silence())

    def _commands(self) -> list[GuardCommand]:
        specification = self._specification
        nodes: list[Node] = [self._nodes[name] for name in specification.nodes]
        run_id, worker = specification.run_id, specification.worker
        if specification.backend == "mpi" and specification.scratch is not None:
            scratch = Path(specification.scratch)
            return mpi_commands(run_id, nodes, find_openmpi(), scratch, worker)
        return direct_commands(run_id, nodes, worker)

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
        if not leads and process.stdin is not None:
            process.stdin.close()
        self._spawn(self._await_exit(command, process, readers))

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._task_done)

    def _task_done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._finish(Outcome.failed(f"internal error: {type(error).__name__}: {error}"))

    # --- the conversation with the leader's guard -----------------------------------------------

    def _tell(self, message: Heartbeat | StopRun) -> None:
        if self._processes and (stdin := self._processes[0][1].stdin) and not stdin.is_closing():
            stdin.write(_encoder.encode(message) + b"\n")

    async def _beat(self) -> None:
        while True:
            self._tell(Heartbeat())
            await asyncio.sleep(self._deadlines.heartbeat_interval)

    async def _listen_for_silence(self) -> None:
        """The leader's guard sends a heartbeat a second; one that does not is as good as gone."""
        started = looked_at = self._loop.time()
        while True:
            await asyncio.sleep(0.25)
            now = self._loop.time()
            if now - looked_at > _OWN_PAUSE_SECONDS:
                started = now
                self._heard_at = now if self._heard_at is not None else None
            looked_at = now
            if self._heard_at is None:
                limit, since = self._deadlines.initialisation, started
            else:
                limit, since = self._deadlines.liveness, self._heard_at
            if now - since > limit:
                cause = f"its guard was silent for {limit:.0f} s"
                node = self._specification.nodes[0]
                self._finish(Outcome.failed(cause, rank=0, node=node, wait=False))
                return

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
                ended = Outcome.failed(cause) if failed else Outcome.stopped(cause)
                self._finish(ended)
            case RunReady() if self.stopping:
                return
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
    ) -> None:
        status = await process.wait()
        # What it said last may explain it; a grandchild may hold the pipe open for longer.
        await asyncio.wait(readers, timeout=_DRAIN_SECONDS)
        if 0 not in command.ranks:
            # The guard of rank 0 sees the loss too, and knows more.
            await asyncio.sleep(_DRAIN_SECONDS)
        if not self._over.done():
            self._finish(self._outcome_of_exit(command, status))

    def _outcome_of_exit(self, command: GuardCommand, status: int) -> Outcome:
        if self._stop_cause is not None:
            return Outcome.stopped(self._stop_cause)
        last_lines = self._journal.last_lines(command)
        rank = rank_to_blame(command, last_lines)
        return Outcome.failed(
            describe_exit(command, status, rank),
            rank=rank,
            node=self._specification.nodes[rank] if rank is not None else None,
            exit_status=status,
            last_lines=last_lines,
        )

    def _settle(self, outcome: Outcome) -> Outcome:
        """Prefer what the user asked for, then the first failure that a guard has reported."""
        if self._stop_cause is not None:
            return Outcome.stopped(self._stop_cause)
        if self._root is not None:
            return Outcome.of_failure(self._root)
        if not outcome.has_failed:
            # Nobody asked for it here: the guard was told by somebody else.
            return Outcome.failed(outcome.cause)
        return outcome

    async def _end_everything(self, outcome: Outcome) -> dict[str, str]:
        """Give the processes a moment, then end them; returns what could not be ended, by node."""
        self._journal.set_state("stopping", outcome.cause)
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

    def _kill_own(self) -> None:
        """SIGKILL the sessions that this process has started."""
        for _, process in self._processes:
            if process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)

    async def _clear(self, node: Node) -> str:
        """End what is left of the run on a node and check it; returns what is wrong, or nothing."""
        run_id = self._specification.run_id
        try:
            left = await asyncio.to_thread(node.kill_run, run_id)
            await asyncio.to_thread(node.remove_bootstraps, run_id)
        except ClusterError as error:
            return error.message
        return ", ".join(f"process {process.pid} could not be ended" for process in left)

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
