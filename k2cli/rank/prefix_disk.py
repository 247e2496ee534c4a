"""Setting up the prefix cache on disk in the ranks of a run."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable, Mapping

from k2cli.protocol import Assignment, Decision, FollowerMessage, StoreReport
from k2cli.protocol.wire import Channel, ConnectionLost
from k2cli.rank.engine.engine import Engine
from k2cli.rank.engine.stored_prefixes import StoredPrefixes
from k2cli.rank.executor import Executor
from k2cli.rank.kv_cache.store import BlockStore, rank_identity, run_identity
from k2cli.sharding.stage import Stage
from k2cli.stderr import say_on_stderr


def store_identity(assignment: Assignment, stage: Stage) -> str:
    """Return what a rank tells the leader about its part; "" without a prefix cache on disk."""
    if not assignment.prefix_disk_bytes:
        return ""
    try:
        return rank_identity(assignment, stage)
    except OSError as error:
        say_on_stderr(f"rank {assignment.rank}: no prefix cache on disk: {error}")
        return ""


def prepare_follower(
    assignment: Assignment, executor: Executor, channel: Channel[Decision]
) -> Callable[[FollowerMessage], None]:
    """Give a follower's executor a store; return how to send to the leader from any thread."""
    lock = threading.Lock()

    def send(message: FollowerMessage) -> None:
        with lock:
            channel.send(message)

    def report(message: StoreReport) -> None:
        with contextlib.suppress(ConnectionLost):  # the main thread ends this process
            send(message)

    if assignment.prefix_disk_bytes:
        executor.store = BlockStore(assignment, _layers(executor), report)
    return send


def open_on_leader(
    assignment: Assignment, executor: Executor, engine: Engine, identities: Mapping[int, str]
) -> None:
    """Let all ranks open their stores, if the run has a prefix cache on disk.

    Args:
        identities: what each rank has told about its part.
    """
    if not assignment.prefix_disk_bytes:
        return
    if not executor.caches.prefixes.cuttable:
        say_on_stderr(
            "no prefix cache on disk: the caches of this model hold windows or recurrent states, "
            "which cannot be cut into blocks"
        )
        return
    if not all(identities.values()):
        return
    reports: queue.SimpleQueue[StoreReport] = queue.SimpleQueue()
    store = BlockStore(assignment, _layers(executor), reports.put)
    stored = StoredPrefixes(engine.sender, engine.keeper, store, reports, assignment)
    executor.store = store
    ordered = [identities[rank] for rank in range(assignment.size)]
    folder = run_identity(assignment, ordered)
    engine.use_stored(stored, folder, assignment.prefix_disk_bytes)


def _layers(executor: Executor) -> int:
    return len(executor.stage.make_local_cache())
