"""A rank process: ``python -m k2cli.rank.main``, started by its guard and by nothing else.

A rank connects to the other ranks, loads its part of the model, takes part in the self-test and
then serves: the leader runs the engine, followers carry out its decisions.

One thread loads and computes, because MLX streams belong to a thread. A second thread listens to
the guard and ends the process at once when the guard is gone. Every failure is reported to the
guard, and then the process ends without MPI's finalizer, which would wait for the other ranks.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from k2cli.child_process import end_with_parent
from k2cli.errors import ClusterError
from k2cli.pauses import Deadline
from k2cli.protocol import (
    Assignment,
    Cancel,
    ControlEndpoint,
    ControlListening,
    Decision,
    EngineReady,
    Fatal,
    Generate,
    GuardMessage,
    Heartbeat,
    Holdings,
    LoadProgress,
    RankMessage,
    RankReady,
    Shutdown,
    Start,
    Tick,
    Warm,
    WarmUp,
)
from k2cli.protocol.progress_page import MlxMemory, Phase, ProgressPage
from k2cli.protocol.wire import Channel
from k2cli.rank.fatal_errors import fatal
from k2cli.rank.guard_link import GuardLink
from k2cli.settings import RUN_OPTION, runs_directory

if TYPE_CHECKING:
    from k2cli.rank.kernels.cache import KernelCache

_IDLE_SECONDS = 0.5
_IDLE_WORK_SECONDS = 0.01
_LAST_RANK_SECONDS = 0.05


def main() -> None:
    """Run a rank from the guard's assignment to its end; never returns."""
    end_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parser = argparse.ArgumentParser(prog="k2cli.rank.main")
    parser.add_argument(RUN_OPTION, required=True, help="id of the run")
    parser.add_argument("--rank", required=True, type=int)
    parser.add_argument("--guard-fd", required=True, type=int)
    parser.add_argument("--progress-fd", required=True, type=int)
    arguments = parser.parse_args()
    link = GuardLink(arguments.guard_fd)
    page = ProgressPage(arguments.progress_fd)
    start: Start | None = None
    try:
        start = link.receive_start()
        link.start_listening(start.deadlines)
        Rank(link, page, start).run()
    except BaseException as error:
        link.send(fatal(error, start.assignment if start is not None else None))
        _end(1)
    page.advance("ending")
    _end(0)


class Rank:
    """One rank, from its assignment to its end."""

    def __init__(self, link: GuardLink, page: ProgressPage, start: Start) -> None:
        self._link = link
        self._page = page
        self._start = start
        self._assignment: Assignment = start.assignment
        self._last_progress = 0.0
        self._warm = False
        self._kernels: KernelCache | None = None

    def run(self) -> None:
        """Load, take part in the self-test and serve; return after an ordered shutdown."""
        try:
            if self._assignment.rank == 0:
                self._run_leader()
            else:
                self._run_follower()
        finally:
            if self._kernels is not None:
                self._share_kernels()
                self._kernels.close()

    def _run_leader(self) -> None:
        from k2cli.rank.control import Followers
        from k2cli.rank.engine.engine import Engine
        from k2cli.rank.engine.lookahead import looks_ahead
        from k2cli.rank.engine.masks import Masks
        from k2cli.rank.executor import Executor
        from k2cli.rank.startup.prefix_disk import open_on_leader
        from k2cli.rank.startup.warm_up import warm_up

        deadlines = self._start.deadlines
        followers = Followers(self._lost_follower)
        self._connect_followers(followers)
        group, part = self._load(lambda: self._call_followers(followers))
        identities = self._check_coverage(followers, part)
        executor = Executor(part.stage, group, self._advance, meets=self._assignment.meets)
        engine = Engine(
            executor,
            followers,
            self._send_answers,
            size=self._assignment.size,
            context_length=self._assignment.context_length,
            concurrency=self._assignment.concurrency,
            prefill_chunk_tokens=self._assignment.prefill_chunk_tokens,
            looks_ahead=looks_ahead(self._assignment),
            masks=Masks(self._assignment, executor.about_to_wait),
            speculation=self._assignment.speculation,
        )
        self._page.advance("warming up")
        checked_tokens = warm_up(
            engine, followers, self._assignment, self._report_shape, deadlines.work_stall
        )
        self._warm = True
        remark = open_on_leader(self._assignment, executor, engine, identities)
        self._page.advance("idle")
        self._link.send(EngineReady(checked_tokens, remark))
        engine.report_cache_use()
        self._serve(engine)
        followers.close()
        engine.quit()

    def _run_follower(self) -> None:
        from k2cli.rank.control import connect_to_leader
        from k2cli.rank.executor import Executor
        from k2cli.rank.follower import follow
        from k2cli.rank.startup.prefix_disk import prepare_follower, store_identity

        endpoint = self._wait_for_endpoint()
        timeout = self._start.deadlines.initialisation
        rank = self._assignment.rank
        channel = connect_to_leader(endpoint, rank, self._start.secret, timeout)
        group, part = self._load(lambda: self._wait_for_leader(channel))
        channel.send(Holdings(rank, part.held, store_identity(self._assignment, part.stage)))
        executor = Executor(part.stage, group, self._advance, meets=self._assignment.meets)
        send = prepare_follower(self._assignment, executor, channel)
        self._page.advance("warming up")
        threading.Thread(target=self._end_on_shutdown, daemon=True).start()
        follow(channel, executor, self._advance, rank, self._on_warm_up, send)

    def _load(self, wait_for_peers: Callable[[], None]) -> tuple[Any, Any]:
        """Wait for the peers, join the MLX group and load this rank's part."""
        import mlx.core as mx

        from k2cli.rank.group import join_group, set_memory_limits, wire_weights
        from k2cli.rank.kernels.cache import open_kernel_cache
        from k2cli.rank.kernels.device import check_kernels
        from k2cli.rank.loader import load_part

        self._kernels = open_kernel_cache(self._own_folder)
        self._page.measure_mlx = lambda: MlxMemory(
            mx.get_active_memory(), mx.get_cache_memory(), mx.get_peak_memory()
        )
        self._report("initialising")
        wait_for_peers()
        group = join_group(self._assignment)
        self._link.end_timer()
        set_memory_limits(self._assignment)
        started = time.monotonic()
        self._report("loading")
        part = load_part(
            self._assignment, group, lambda done, total: self._report("loading", done, total)
        )
        wire_weights(self._assignment)
        self._link.send(
            RankReady(
                self._assignment.rank,
                weights_bytes=part.weights_bytes,
                active_memory_bytes=mx.get_active_memory(),
                peak_memory_bytes=mx.get_peak_memory(),
                load_seconds=time.monotonic() - started,
                bytes_read=part.bytes_read,
            )
        )
        self._report("checking")
        check_kernels(part.stage.model)
        return group, part

    def _report(
        self,
        phase: Literal["initialising", "loading", "checking"],
        done: int = 0,
        total: int = 0,
    ) -> None:
        self._page.advance(phase)
        now = time.monotonic()
        if done in (0, total) or now - self._last_progress > 0.2:
            self._last_progress = now
            self._link.send(LoadProgress(self._assignment.rank, phase, done, total))

    def _report_shape(self, shape: str, number: int, count: int) -> None:
        rank = self._assignment.rank
        self._link.send(LoadProgress(rank, "warming up", shape=shape, number=number, count=count))

    def _advance(self, phase: Phase, *, joint: bool = False) -> None:
        """Record progress; until requests come, all computing is ``warming up``."""
        if not self._warm and phase in ("busy", "computing a new shape"):
            phase = "warming up"
        self._page.advance(phase, joint=joint)
        if phase == "idle" or not self._warm:
            self._share_kernels()

    @property
    def _own_folder(self) -> Path:
        """A folder of this rank alone, which goes with its run's."""
        return runs_directory() / self._assignment.run_id / f"kernels-{self._assignment.rank}"

    def _share_kernels(self) -> None:
        """Share compiled kernels with later runs; called where MLX compiles nothing."""
        if self._kernels is not None:
            with contextlib.suppress(OSError):  # a full disk makes later starts slow, no more
                self._kernels.publish()

    # --- the leader ------------------------------------------------------------------------------

    def _connect_followers(self, followers: Any) -> None:
        if self._assignment.size == 1:
            return
        listener = followers.listen(self._start.control_host)
        self._link.send(ControlListening(listener.getsockname()[1]))
        timeout = self._start.deadlines.initialisation
        followers.accept(listener, self._assignment.size - 1, self._start.secret, timeout)

    def _call_followers(self, followers: Any) -> None:
        """Tell the followers to join the MLX group, once all of them have loaded MLX.

        Loading MLX from a cold disk may take minutes, and joining holds the GIL meanwhile.
        """
        prepared = 0
        while prepared < self._assignment.size - 1:
            self._page.advance("initialising")
            with contextlib.suppress(queue.Empty):
                prepared += isinstance(followers.inbox.get(timeout=_IDLE_SECONDS), Heartbeat)
            if self._shutdown_requested():
                _end(0)
        followers.send(Tick(0))

    def _check_coverage(self, followers: Any, part: Any) -> dict[int, str]:
        """Compare every rank's list of loaded tensors with the checkpoint.

        Return what each rank tells about its part for the prefix cache on disk.
        """
        from k2cli.rank.loader import placement_of
        from k2cli.rank.startup.prefix_disk import store_identity
        from k2cli.sharding.coverage import check_coverage

        held = {0: part.held}
        identities = {0: store_identity(self._assignment, part.stage)}
        while len(held) < self._assignment.size:
            # No time limit: the guard of the slowest rank watches its progress. This rank does no
            # work meanwhile, which would prolong the limit of one that hangs.
            self._page.advance("waiting")
            with contextlib.suppress(queue.Empty):
                message = followers.inbox.get(timeout=_IDLE_SECONDS)
                if isinstance(message, Holdings):
                    held[message.rank] = message.tensors
                    identities[message.rank] = message.identity
            if self._shutdown_requested():
                _end(0)
        shapes = [
            {tensor.name: tuple(tensor.shape) for tensor in held[rank]} for rank in sorted(held)
        ]
        check_coverage(part.whole, placement_of(self._assignment), shapes)
        return identities

    def _serve(self, engine: Any) -> None:
        """Alternate between new messages and one engine step, until the guard requests shutdown."""
        while True:
            message = self._next_message(engine)
            if isinstance(message, Shutdown):
                return
            if isinstance(message, Generate | Cancel):
                engine.accept(message)
                continue  # empty the inbox before the next step
            if engine.busy:
                self._advance("busy")
                engine.advance()
            else:
                self._advance("idle")
                engine.tick()

    def _next_message(self, engine: Any) -> GuardMessage | None:
        try:
            if engine.busy:
                return self._link.inbox.get_nowait()
            timeout = _IDLE_WORK_SECONDS if engine.has_idle_work else _IDLE_SECONDS
            return self._link.inbox.get(timeout=timeout)
        except queue.Empty:
            return None

    def _shutdown_requested(self) -> bool:
        with contextlib.suppress(queue.Empty):
            return isinstance(self._link.inbox.get_nowait(), Shutdown)
        return False

    def _send_answers(self, messages: Sequence[RankMessage]) -> None:
        """Send the engine's messages to the guard; those of the warm-up are for nobody."""
        if self._warm:
            self._link.send_all(messages)

    def _lost_follower(self, rank: int, cause: str) -> None:
        node = self._assignment.nodes[rank]
        self._link.send(Fatal(f"lost rank {rank} on {node}: {cause}", kind="lost peer"))
        _end(1)

    # --- a follower ------------------------------------------------------------------------------

    def _wait_for_endpoint(self) -> ControlEndpoint:
        limit = Deadline(self._start.deadlines.initialisation)
        while not limit.has_passed:
            self._page.advance("initialising")
            with contextlib.suppress(queue.Empty):
                message = self._link.inbox.get(timeout=_IDLE_SECONDS)
                if isinstance(message, ControlEndpoint):
                    return message
                if isinstance(message, Shutdown):
                    _end(0)
        raise ClusterError("the leader's control port was not announced in time")

    def _wait_for_leader(self, channel: Channel[Decision]) -> None:
        """Wait until the leader is about to join the MLX group.

        In MLX's ring the last rank connects to the leader, and all other ranks wait for a
        connection. MLX repeats an attempt that comes too early only after a second.
        """
        channel.send(Heartbeat())  # this rank has loaded MLX
        limit = Deadline(self._start.deadlines.work_stall)
        while channel.receive(_IDLE_SECONDS) is None:
            if limit.has_passed:
                raise ClusterError("the leader did not join the MLX group in time")
            self._page.advance("initialising")
        if self._assignment.rank == self._assignment.size - 1:
            time.sleep(_LAST_RANK_SECONDS)

    def _on_warm_up(self, decision: WarmUp | Warm) -> None:
        if isinstance(decision, Warm):
            self._warm = True
        else:
            self._report_shape(decision.shape, decision.number, decision.count)

    def _end_on_shutdown(self) -> None:
        """End the process on request, even while the main thread waits in a collective."""
        while not isinstance(self._link.inbox.get(), Shutdown):
            pass
        _end(0)


def _end(status: int) -> None:
    """Exit without MPI's finalizer, which would wait for the other ranks."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    main()
