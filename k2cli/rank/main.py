"""A rank: ``python -m k2cli.rank.main``, started by its guard and by nobody else.

One thread loads and computes, because MLX streams belong to a thread. A second thread listens to
the guard and ends the process at once when the guard is gone. Whatever fails is reported to the
guard, and then the process ends without MPI's finalizer, which would wait for the other ranks.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import faulthandler
import os
import queue
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Any, Literal

from k2cli.errors import ClusterError, K2Error
from k2cli.protocol import (
    Assignment,
    Cancel,
    ControlEndpoint,
    ControlListening,
    Deadlines,
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
)
from k2cli.protocol.progress_page import Phase, ProgressPage
from k2cli.protocol.wire import Channel, ConnectionLost
from k2cli.settings import RUN_OPTION

_IDLE_SECONDS = 0.5
_LAST_RANK_SECONDS = 0.05
_PR_SET_PDEATHSIG = 1


class GuardLink:
    """The rank's end of the socket pair: sends from any thread, receives in one of its own."""

    def __init__(self, descriptor: int) -> None:
        connection = socket.socket(fileno=descriptor)
        self._channel: Channel[GuardMessage] = Channel(connection, GuardMessage)
        self._lock = threading.Lock()
        self.inbox: queue.Queue[GuardMessage] = queue.Queue()

    def send(self, message: RankMessage) -> None:
        """Tell the guard; a guard that is gone ends this process."""
        self.send_all([message])

    def send_all(self, messages: Sequence[RankMessage]) -> None:
        """Tell the guard several things at once."""
        try:
            with self._lock:
                self._channel.send(*messages)
        except ConnectionLost:
            os._exit(1)

    def start_listening(self, deadlines: Deadlines) -> None:
        """Fill the inbox from now on, and end the process when the guard is gone."""
        threading.Thread(target=self._listen, args=(deadlines,), daemon=True).start()

    def receive_start(self) -> Start:
        """The first message, which is always the assignment."""
        message = self._channel.receive()
        assert isinstance(message, Start)
        return message

    def _listen(self, deadlines: Deadlines) -> None:
        last_word = deadlines.initialisation + deadlines.liveness
        try:
            while True:
                # Fires in C, without the GIL, if this thread cannot run for so long: a join that
                # holds the GIL for ever, on a system that has no parent-death signal.
                faulthandler.dump_traceback_later(last_word, exit=True)
                message = self._channel.receive(timeout_seconds=1.0)
                if message is not None and not isinstance(message, Heartbeat):
                    self.inbox.put(message)
        except ConnectionLost:
            os._exit(1)


class Rank:
    """The life of one rank, from its assignment to its end."""

    def __init__(self, link: GuardLink, page: ProgressPage, start: Start) -> None:
        self._link = link
        self._page = page
        self._start = start
        self._assignment: Assignment = start.assignment
        self._last_progress = 0.0
        self._warm = False

    def live(self) -> None:
        """Load, prove, serve; returns after an ordered shutdown."""
        if self._assignment.rank == 0:
            self._lead()
        else:
            self._follow()

    def _report(
        self,
        phase: Literal["initialising", "loading", "checking", "warming up"],
        done: int = 0,
        total: int = 0,
    ) -> None:
        self._page.advance(phase)
        now = time.monotonic()
        if done in (0, total) or now - self._last_progress > 0.2:
            self._last_progress = now
            self._link.send(LoadProgress(self._assignment.rank, phase, done, total))

    def _load(self, meet: Callable[[], None]) -> tuple[Any, Any]:
        """Join the group, once ``meet`` returns, and load this rank's part."""
        import mlx.core as mx

        from k2cli.rank.group import join_group
        from k2cli.rank.loader import load_part

        self._page.measure_mlx = mx.get_active_memory
        self._report("initialising")
        meet()
        group = join_group(self._assignment)
        _set_memory_limits(self._assignment)
        started = time.monotonic()
        self._report("loading")
        part = load_part(
            self._assignment, group, lambda done, total: self._report("loading", done, total)
        )
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
        return group, part

    def _follow(self) -> None:
        from k2cli.rank.control import connect_to_leader
        from k2cli.rank.executor import Executor
        from k2cli.rank.follower import follow

        endpoint = self._wait_for_endpoint()
        timeout = self._start.deadlines.initialisation
        rank = self._assignment.rank
        channel = connect_to_leader(endpoint, rank, self._start.secret, timeout)
        group, part = self._load(lambda: self._wait_for_leader(channel))
        channel.send(Holdings(rank, part.held))
        executor = Executor(part.stage, group, self._page.advance)
        self._page.advance("warming up")
        threading.Thread(target=self._obey_shutdown, daemon=True).start()
        follow(channel, executor, self._page, rank)

    def _wait_for_leader(self, channel: Channel[Decision]) -> None:
        """Until the leader joins the group too.

        In MLX's ring the last rank calls the leader first, all others wait to be called; a call
        that comes too early is made again only after a whole second.
        """
        deadline = time.monotonic() + self._start.deadlines.initialisation
        while channel.receive(_IDLE_SECONDS) is None:
            if time.monotonic() > deadline:
                raise ClusterError("the leader did not come to join the group in time")
            self._page.advance("initialising")
        if self._assignment.rank == self._assignment.size - 1:
            time.sleep(_LAST_RANK_SECONDS)

    def _wait_for_endpoint(self) -> ControlEndpoint:
        deadline = time.monotonic() + self._start.deadlines.initialisation
        while time.monotonic() < deadline:
            self._page.advance("initialising")
            with contextlib.suppress(queue.Empty):
                message = self._link.inbox.get(timeout=_IDLE_SECONDS)
                if isinstance(message, ControlEndpoint):
                    return message
                if isinstance(message, Shutdown):
                    _end(0)
        raise ClusterError("the leader's control port was not announced in time")

    def _obey_shutdown(self) -> None:
        """A follower may be inside a collective when it is told to end."""
        while not isinstance(self._link.inbox.get(), Shutdown):
            pass
        _end(0)

    def _lead(self) -> None:
        from k2cli.rank.control import Followers
        from k2cli.rank.engine.engine import Engine
        from k2cli.rank.engine.lookahead import looks_ahead
        from k2cli.rank.executor import Executor
        from k2cli.rank.self_test import sing

        deadlines = self._start.deadlines
        followers = Followers(self._lost_follower)
        self._gather(followers)
        group, part = self._load(lambda: followers.send(Tick(0)))
        self._check_coverage(followers, part)
        executor = Executor(part.stage, group, self._advance)
        engine = Engine(
            executor,
            followers,
            self._link.send_all,
            size=self._assignment.size,
            context_length=self._assignment.context_length,
            concurrency=self._assignment.concurrency,
            prefill_chunk_tokens=self._assignment.prefill_chunk_tokens,
            looks_ahead=looks_ahead(self._assignment),
        )
        self._report("warming up")
        sing(engine, followers, self._assignment.size, deadlines.warmup_stall)
        self._warm = True
        self._page.advance("idle")
        self._link.send(EngineReady())
        self._serve(engine)
        followers.close()
        engine.quit()

    def _advance(self, phase: Phase) -> None:
        """Kernels may be compiled during warm-up: only after it is a step known to be short."""
        self._page.advance(phase if self._warm else "warming up")

    def _gather(self, followers: Any) -> None:
        if self._assignment.size == 1:
            return
        listener = followers.listen(self._start.control_host)
        self._link.send(ControlListening(listener.getsockname()[1]))
        timeout = self._start.deadlines.initialisation
        followers.accept(listener, self._assignment.size - 1, self._start.secret, timeout)

    def _lost_follower(self, rank: int, cause: str) -> None:
        node = self._assignment.nodes[rank]
        self._link.send(Fatal(f"lost rank {rank} on {node}: {cause}", kind="lost peer"))
        _end(1)

    def _check_coverage(self, followers: Any, part: Any) -> None:
        """Wait for every rank's list of what it holds, and hold them against the checkpoint."""
        from k2cli.rank.loader import placement_of
        from k2cli.sharding.coverage import check_coverage

        held = {0: part.held}
        while len(held) < self._assignment.size:
            # However long the slowest rank loads: its guard watches that it gets on.
            self._page.advance("checking")
            with contextlib.suppress(queue.Empty):
                message = followers.inbox.get(timeout=_IDLE_SECONDS)
                if isinstance(message, Holdings):
                    held[message.rank] = message.tensors
            if self._shutdown_asked():
                _end(0)
        shapes = [
            {tensor.name: tuple(tensor.shape) for tensor in held[rank]} for rank in sorted(held)
        ]
        check_coverage(part.whole, placement_of(self._assignment), shapes)

    def _shutdown_asked(self) -> bool:
        with contextlib.suppress(queue.Empty):
            return isinstance(self._link.inbox.get_nowait(), Shutdown)
        return False

    def _serve(self, engine: Any) -> None:
        """Until the guard says shut down: take what came in, do one step, and so on."""
        while True:
            message = self._next_message(engine.busy)
            if isinstance(message, Shutdown):
                return
            if isinstance(message, Generate | Cancel):
                engine.accept(message)
                continue  # the whole inbox comes before the next step
            if engine.busy:
                self._page.advance("busy")
                engine.advance()
            else:
                self._page.advance("idle")
                engine.tick()

    def _next_message(self, busy: bool) -> GuardMessage | None:
        try:
            return (
                self._link.inbox.get_nowait()
                if busy
                else self._link.inbox.get(timeout=_IDLE_SECONDS)
            )
        except queue.Empty:
            return None


def _set_memory_limits(assignment: Assignment) -> None:
    import mlx.core as mx

    if assignment.wired_limit_bytes is not None and mx.metal.is_available():
        mx.set_wired_limit(assignment.wired_limit_bytes)
    if assignment.cache_limit_bytes is not None:
        mx.set_cache_limit(assignment.cache_limit_bytes)


def _end(status: int) -> None:
    """Leave at once: MPI's finalizer, run at interpreter exit, would wait for the other ranks."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _die_with_parent() -> None:
    """Linux: the kernel kills this rank when its guard dies, even while it is stopped."""
    if sys.platform == "linux":
        parent = os.getppid()
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:
            os._exit(1)


_FatalKind = Literal["memory", "lost peer", "internal"]
_MARKS: tuple[tuple[str, _FatalKind], ...] = (
    ("unable to allocate", "memory"),
    ("out of memory", "memory"),
    ("bad_alloc", "memory"),
    ("connection to a peer", "lost peer"),
    ("[ring]", "lost peer"),
)


def _kind_of(error: BaseException, text: str) -> _FatalKind:
    """What an error most likely comes of, by what MLX's back ends are known to say."""
    if isinstance(error, MemoryError):
        return "memory"
    return next((kind for mark, kind in _MARKS if mark in text.lower()), "internal")


def _fatal(error: BaseException) -> Fatal:
    """The last message of a rank."""
    if isinstance(error, K2Error):
        return Fatal(f"{error.message} ({error.hint})" if error.hint else error.message)
    if isinstance(error, ConnectionLost):
        return Fatal(f"lost a control connection: {error}", kind="lost peer")
    text = f"{type(error).__name__}: {error}"
    return Fatal(text, "".join(traceback.format_exception(error)), _kind_of(error, text))


def main() -> None:
    """Entry point; never returns."""
    _die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parser = argparse.ArgumentParser(prog="k2cli.rank.main")
    parser.add_argument(RUN_OPTION, required=True, help="id of the run")
    parser.add_argument("--rank", required=True, type=int)
    parser.add_argument("--guard-fd", required=True, type=int)
    parser.add_argument("--progress-fd", required=True, type=int)
    arguments = parser.parse_args()
    link = GuardLink(arguments.guard_fd)
    page = ProgressPage(arguments.progress_fd)
    try:
        start = link.receive_start()
        link.start_listening(start.deadlines)
        Rank(link, page, start).live()
    except BaseException as error:
        link.send(_fatal(error))
        _end(1)
    page.advance("ending")
    _end(0)


if __name__ == "__main__":
    main()
