"""Setting up the prefix cache on disk in the ranks of a run, and what its stores belong to."""

from __future__ import annotations

import contextlib
import hashlib
import queue
import threading
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from k2cli import __version__
from k2cli.files import read_regular
from k2cli.protocol import Assignment, Decision, FollowerMessage, StoreReport
from k2cli.protocol.wire import Channel, ConnectionLost
from k2cli.rank.engine.engine import Engine
from k2cli.rank.engine.prefixes.disk_cache import DiskCache
from k2cli.rank.executor import Executor
from k2cli.rank.kv_cache.block_store import BlockStore
from k2cli.rank.kv_cache.segments import form
from k2cli.sharding.stage import Stage
from k2cli.stderr import say_on_stderr

_MOST_CONFIG_BYTES = 2**24


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
) -> str:
    """Let all ranks open their stores, if the run has a prefix cache on disk.

    Args:
        identities: what each rank has told about its part.

    Returns:
        Why there is none although one was asked for; otherwise "".
    """
    if not assignment.prefix_disk_bytes:
        return ""
    remark = _open(assignment, executor, engine, identities)
    if remark:
        remark = f"no prefix cache on disk: {remark}"
        say_on_stderr(remark)
    return remark


def _open(
    assignment: Assignment, executor: Executor, engine: Engine, identities: Mapping[int, str]
) -> str:
    if not executor.caches.prefixes.cuttable:
        return (
            "the caches of this model hold windows or recurrent states, which cannot be cut into "
            "blocks"
        )
    lacking = [str(rank) for rank, identity in sorted(identities.items()) if not identity]
    if lacking:
        return f"the model's files could not be examined by rank {', '.join(lacking)}"
    reports: queue.SimpleQueue[StoreReport] = queue.SimpleQueue()
    store = BlockStore(assignment, _layers(executor), reports.put)
    disk = DiskCache(engine.sender, engine.keeper, store, reports, assignment)
    executor.store = store
    ordered = [identities[rank] for rank in range(assignment.size)]
    folder = run_identity(assignment, ordered)
    engine.use_disk_cache(disk, folder, assignment.prefix_disk_bytes)
    if not disk.blocks.usable:
        return store.problem or "the disk of a node cannot be used: k2 logs tells which"
    return ""


def _layers(executor: Executor) -> int:
    return len(executor.stage.make_local_cache())


# --- what stores belong to ----------------------------------------------------------------------


def rank_identity(assignment: Assignment, stage: Stage) -> str:
    """Return a digest of what a rank's caches depend on, beside the run's placement.

    Weights of hundreds of gigabytes are not read for it: a file counts as the same if its name
    (in the Hub's cache a digest of its content), size and time of change are.
    """
    folder = Path(assignment.model_path)
    config = read_regular(folder / "config.json", _MOST_CONFIG_BYTES, follow_links=True)
    digest = hashlib.sha256(config)
    for path in sorted(folder.glob("*.safetensors")):
        found, real = path.stat(), path.resolve().name
        digest.update(f"{path.name} {real} {found.st_size} {found.st_mtime_ns}\n".encode())
    digest.update(f"{form(stage)} {__version__} {_version('mlx')} {_version('mlx-lm')}".encode())
    return digest.hexdigest()


def run_identity(assignment: Assignment, identities: list[str]) -> str:
    """Return the name of a run's stores: a digest of the placement and all ranks' identities."""
    parts = (
        assignment.size,
        assignment.strategy,
        assignment.layers,
        assignment.head,
        assignment.dtype,
        assignment.expansion_weight,
        identities,
    )
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""
