"""Locks on all machines of a launch: all are taken, or none."""

from __future__ import annotations

import random
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

import msgspec
import psutil

from k2cli.agent.activity import start_of
from k2cli.agent.locks import Claim, DeviceClaim, Lock, LockAnswer, bytes_on
from k2cli.errors import ClusterError
from k2cli.gpu_name import GpuName
from k2cli.nodes.node import REACH_SECONDS, Node
from k2cli.planning.hardware.gpus import CONTEXT_BYTES
from k2cli.settings import user_name
from k2cli.units import format_bytes, format_duration, replace_surrogates

_POLL_SECONDS = 2.0
_SAY_SECONDS = 30.0
# Each choice that fails means that another launch has locked a GPU since it was made.
_MOST_CHOICES = 64
Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class RankNeed:
    """The memory that one rank needs, and its share of what its machine or GPU has.

    ``memory_bytes`` is the whole memory of its ``gpu``, if it has one.
    """

    bytes: int
    limit_bytes: int
    gpu: GpuName | None = None
    memory_bytes: int = 0


class BusyError(ClusterError):
    """Error for a machine that is locked by another run; ``holder`` is that run's id."""

    def __init__(self, message: str, hint: str, holder: str) -> None:
        super().__init__(message, hint)
        self.holder = holder


def take_locks(
    nodes: Sequence[Node],
    run_id: str,
    needs: Mapping[str, Sequence[RankNeed]],
    *,
    model: str = "",
    folders: Mapping[str, str] | None = None,
    share: bool = False,
    wait_seconds: float = 0.0,
    say: Say = lambda text: None,
    choose_again: Callable[[], Mapping[str, Sequence[RankNeed]] | None] = lambda: None,
) -> None:
    """Lock every node, in the order of their names.

    Locks taken so far are released before each wait, so two launches cannot deadlock.

    Args:
        nodes: the nodes of the ranks; repeated ones count once.
        run_id: the run that takes the locks.
        needs: maps a node to what each rank needs there.
        model: the reference of the launch.
        folders: maps a node to the model's folder there.
        share: True accepts nodes with other runs if the memory of both fits.
        wait_seconds: time to wait for other runs to end.
        say: called with a line when it waits, and for each stale lock that it removed.
        choose_again: called if a node is locked by another run; returns other needs, for GPUs that
            are free now, or None if there are none.

    Raises:
        BusyError: if another run has locked a node.
        ClusterError: if a node cannot be asked.
    """
    # A plain clock: after a pause of this process the nodes are asked once more before it gives up.
    until = time.monotonic() + wait_seconds
    said, say_again_at = "", 0.0
    choices_left = _MOST_CHOICES
    while True:
        try:
            claims = {
                node.name: msgspec.structs.replace(
                    _claim(run_id, needs.get(node.name, ())),
                    model=replace_surrogates(model),
                    folder=replace_surrogates((folders or {}).get(node.name, "")),
                )
                for node in nodes
            }
            _take_all(nodes, run_id, claims, share=share, say=say)
        except BusyError as error:
            chosen = choose_again() if choices_left else None
            if chosen is not None:
                needs, choices_left = chosen, choices_left - 1
                continue
            left = until - time.monotonic()
            if left <= 0:
                raise
            if error.holder != said or time.monotonic() >= say_again_at:
                say(f"waiting up to {format_duration(left)}: {error.message}")
                said, say_again_at = error.holder, time.monotonic() + _SAY_SECONDS
            # A random delay, so that waiting launches do not all try at once.
            time.sleep(min(left, _POLL_SECONDS * random.uniform(0.5, 1.0)))
        else:
            return


def _take_all(
    nodes: Sequence[Node], run_id: str, claims: Mapping[str, Claim], *, share: bool, say: Say
) -> None:
    taken: list[Node] = []
    asked: Node | None = None
    try:
        for node in _in_order(nodes):
            claim, asked = claims[node.name], node
            answer: LockAnswer = node.ask(
                LockAnswer, "lock-take", str(int(share)), input=msgspec.json.encode(claim)
            )
            for removed in answer.removed:
                say(f"node {node.name}: removed the lock of {removed}, which has ended")
            asked = None
            if not answer.taken:
                raise _busy(node, claim, answer.holders, share=share)
            taken.append(node)
    except BaseException:
        release_locks(taken, run_id)
        if asked is not None:
            _release_if_reached(asked, run_id)
        raise


def _release_if_reached(node: Node, run_id: str) -> None:
    """Release a lock that may have been taken: the answer was lost, or Ctrl-C came before it."""
    with suppress(ClusterError):
        node.reach(REACH_SECONDS)  # a node that is gone must not hold up the error that says so
        release_locks([node], run_id)


def _in_order(nodes: Sequence[Node]) -> list[Node]:
    known = {node.name: node for node in nodes}
    return [known[name] for name in sorted(known)]


def _claim(run_id: str, needs: Sequence[RankNeed]) -> Claim:
    own = psutil.Process()
    user = replace_surrogates(user_name()) or "unknown"
    host, start = socket.gethostname(), start_of(own.pid)
    return Claim(
        run_id,
        user,
        host,
        own.pid,
        own.create_time(),
        sum(need.bytes for need in needs),
        sum(need.limit_bytes for need in needs),
        time.time(),
        start,
        _devices(needs),
    )


def _devices(needs: Sequence[RankNeed]) -> tuple[DeviceClaim, ...]:
    """Add up the ranks on each GPU. Without the UUID of a GPU, the run claims the machine."""
    gpus = {need.gpu.uuid: need.gpu for need in needs if need.gpu is not None}
    if "" in gpus or any(need.gpu is None for need in needs):
        return ()
    found = []
    for uuid, gpu in gpus.items():
        ranks = [need for need in needs if need.gpu == gpu]
        # Every rank has a context of its own, which neither its plan nor its limit counts.
        needed = sum(need.bytes + CONTEXT_BYTES for need in ranks)
        found.append(DeviceClaim(uuid, gpu.label, needed, ranks[0].memory_bytes))
    return tuple(found)


def _busy(node: Node, claim: Claim, holders: Sequence[Lock], *, share: bool) -> BusyError:
    lock = next((lock for lock in holders if lock.state == "left over"), holders[0])
    owner = lock.claim
    place = _common_place(node, claim, owner)
    who = f"{owner.run_id} of {owner.user}, launched on {owner.host}"
    if lock.state == "left over":
        clean = f"k2 cluster clean --nodes {node.name}"
        message = f"{place} has processes left over from {who}"
        return BusyError(message, clean, owner.run_id)
    since = format_duration(max(time.time() - owner.created, 1))
    message = f"{place} is in use by {who} {since} ago"
    if share:
        message += f", and both do not fit: {_sum_text(claim, [each.claim for each in holders])}"
        return BusyError(message, "to wait for its end: --wait 600", owner.run_id)
    hint = (
        f"to wait for its end: --wait 600; or if both fit: --share; or on {owner.host}: "
        f"k2 stop {owner.run_id}"
    )
    return BusyError(message, hint, owner.run_id)


def _common_place(node: Node, claim: Claim, owner: Claim) -> str:
    """Name the machine, or the GPUs of it that both runs want."""
    theirs = {part.uuid for part in owner.devices}
    labels = [part.label for part in claim.devices if part.uuid in theirs]
    return f"{' and '.join(labels)} of node {node.name}" if labels else f"node {node.name}"


def _sum_text(claim: Claim, others: Sequence[Claim]) -> str:
    """State the bytes of both sides, on the machine or on the GPU that lacks the most."""
    sums = [(sum(other.bytes for other in others), claim.bytes, claim.limit_bytes)]
    if claim.devices and all(other.devices for other in others):
        sums = [
            (sum(bytes_on(other, part.uuid) for other in others), part.bytes, part.limit_bytes)
            for part in claim.devices
        ]
    used, wanted, limit = max(sums, key=lambda each: each[0] + each[1] - each[2])
    return f"{format_bytes(used)} + {format_bytes(wanted)} of {format_bytes(limit)}"


def renew_locks(nodes: Sequence[Node], run_id: str) -> None:
    """Renew the run's lock on every node, with this process as its supervisor.

    A node that cannot be asked is skipped: its guards renew the lock themselves.
    """
    own = psutil.Process()
    identity = (str(own.pid), str(own.create_time()), start_of(own.pid))
    for node in _in_order(nodes):
        _try(node, "lock-renew", run_id, *identity)


def release_locks(nodes: Sequence[Node], run_id: str) -> None:
    """Release the locks on the nodes; on a node that cannot be asked the lock becomes stale."""
    for node in _in_order(nodes):
        _try(node, "lock-release", run_id)


def _try(node: Node, verb: str, *arguments: str) -> None:
    try:
        node.ask(object, verb, *arguments)
    except ClusterError:
        return
