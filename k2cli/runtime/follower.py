"""A follower rank's main loop: receive a decision, carry it out, next."""

from __future__ import annotations

from k2cli.errors import ClusterError
from k2cli.runtime.executor import Executor
from k2cli.runtime.progress import ProgressPage
from k2cli.runtime.protocol import Decision, Forward, Quit, StepDigest, Tick
from k2cli.runtime.wire import Channel

_IDLE_SECONDS = 0.5


def follow(channel: Channel[Decision], executor: Executor, page: ProgressPage, rank: int) -> None:
    """Do what the leader decides until it says quit.

    Raises:
        ClusterError: if a decision is out of order.
        ConnectionLost: if the leader is gone.
    """
    expected_step: int | None = None
    while True:
        decision = channel.receive(_IDLE_SECONDS)
        if decision is None or isinstance(decision, Tick):
            page.advance("idle")
        if decision is None:
            continue
        if expected_step is not None and decision.step != expected_step:
            raise ClusterError(
                f"rank {rank} was told step {decision.step}, its next is {expected_step}"
            )
        expected_step = decision.step + 1
        if isinstance(decision, Quit):
            return
        page.advance("busy" if isinstance(decision, Forward) else "idle")
        result = executor.carry_out(decision)
        if isinstance(decision, Forward):
            if decision.digest:
                channel.send(
                    StepDigest(rank, decision.step, result.arrived_digest, result.computed_digest)
                )
            page.advance("idle")
