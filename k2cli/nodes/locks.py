"""Takes the machines of a launch, all or none, so that two launches do not meet on one."""

from __future__ import annotations

import getpass
import random
import socket
import time
from collections.abc import Callable, Mapping, Sequence

import msgspec
import psutil

from k2cli.agent.locks import Claim, Lock, LockAnswer
from k2cli.errors import ClusterError
from k2cli.nodes.node import Node
from k2cli.units import format_bytes, format_duration

_POLL_SECONDS = 2.0
_SAY_SECONDS = 30.0
Say = Callable[[str], None]


class BusyError(ClusterError):
    """A machine belongs to another run: ``holder`` is that run's id."""

    def __init__(self, message: str, hint: str, holder: str) -> None:
        super().__init__(message, hint)
        self.holder = holder


def take_locks(
    nodes: Sequence[Node],
    run_id: str,
    needs: Mapping[str, tuple[int, int]],
    *,
    share: bool = False,
    wait_seconds: float = 0.0,
    say: Say = lambda text: None,
) -> None:
    """Take every node, in the order of their names.

    All that were taken are given back before it waits, so that two launches cannot block each
    other for good.

    Args:
        nodes: of the ranks; one that repeats counts once.
        run_id: who takes them.
        needs: node to bytes that the run needs there, and bytes that there are.
        share: be content with what memory other runs have left.
        wait_seconds: how long to wait for others to end.
        say: told what it waits for, and which stale locks it has removed.

    Raises:
        BusyError: if another run has one of them.
        ClusterError: if a node cannot be asked.
    """
    until = time.monotonic() + wait_seconds
    said, say_again_at = "", 0.0
    while True:
        try:
            _take_all(nodes, run_id, needs, share=share, say=say)
        except BusyError as error:
            left = until - time.monotonic()
            if left <= 0:
                raise
            if error.holder != said or time.monotonic() >= say_again_at:
                say(f"waiting up to {format_duration(left)}: {error.message}")
                said, say_again_at = error.holder, time.monotonic() + _SAY_SECONDS
            # Not all that wait should come at once.
            time.sleep(min(left, _POLL_SECONDS * random.uniform(0.5, 1.0)))
        else:
            return


def _take_all(
    nodes: Sequence[Node],
    run_id: str,
    needs: Mapping[str, tuple[int, int]],
    *,
    share: bool,
    say: Say,
) -> None:
    taken: list[Node] = []
    try:
        for node in _in_order(nodes):
            claim = _claim(run_id, *needs.get(node.name, (0, 0)))
            answer: LockAnswer = node.ask(
                LockAnswer, "lock-take", str(int(share)), input=msgspec.json.encode(claim)
            )
            for removed in answer.removed:
                say(f"node {node.name}: removed the lock of {removed}, which is gone")
            if not answer.taken:
                raise _busy(node, claim, answer.holders, share=share)
            taken.append(node)
    except BaseException:
        release_locks(taken, run_id)
        raise


def _in_order(nodes: Sequence[Node]) -> list[Node]:
    known = {node.name: node for node in nodes}
    return [known[name] for name in sorted(known)]


def _claim(run_id: str, needed: int, limit: int) -> Claim:
    own = psutil.Process()
    try:
        user = getpass.getuser()
    except (KeyError, OSError):
        user = "unknown"
    return Claim(
        run_id, user, socket.gethostname(), own.pid, own.create_time(), needed, limit, time.time()
    )


def _busy(node: Node, claim: Claim, holders: Sequence[Lock], *, share: bool) -> BusyError:
    lock = next((lock for lock in holders if lock.state == "left over"), holders[0])
    owner = lock.claim
    who = f"{owner.run_id} of {owner.user}, launched on {owner.host}"
    if lock.state == "left over":
        clean = f"k2 cluster clean --nodes {node.name}"
        message = f"node {node.name} has processes left over of {who}"
        return BusyError(message, clean, owner.run_id)
    since = format_duration(max(time.time() - owner.created, 1))
    message = f"node {node.name} is in use by {who} {since} ago"
    if share:
        used = sum(other.claim.bytes for other in holders)
        message += (
            f", and both do not fit: {format_bytes(used)} + {format_bytes(claim.bytes)} "
            f"of {format_bytes(claim.limit_bytes)}"
        )
        return BusyError(message, "--wait waits for its end", owner.run_id)
    hint = f"--wait, or --share if both fit; k2 stop {owner.run_id} on {owner.host} ends it"
    return BusyError(message, hint, owner.run_id)


def renew_locks(nodes: Sequence[Node], run_id: str) -> None:
    """Say on every node that this process supervises the run and lives.

    A node that cannot be asked is passed over: its guards say so themselves.
    """
    own = psutil.Process()
    for node in _in_order(nodes):
        _try(node, "lock-renew", run_id, str(own.pid), str(own.create_time()))


def release_locks(nodes: Sequence[Node], run_id: str) -> None:
    """Give the nodes back; one that cannot be asked finds out by itself that the run is gone."""
    for node in _in_order(nodes):
        _try(node, "lock-release", run_id)


def _try(node: Node, verb: str, *arguments: str) -> None:
    try:
        node.ask(object, verb, *arguments)
    except ClusterError:
        return
