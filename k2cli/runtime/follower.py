"""A follower rank's main loop: receive a decision, carry it out, next."""

from __future__ import annotations

import mlx.core as mx

from k2cli.errors import ClusterError
from k2cli.runtime.executor import Executor, StepResult
from k2cli.runtime.progress import ProgressPage
from k2cli.runtime.protocol import (
    Decision,
    Decode,
    Prefill,
    PrefillTogether,
    Quit,
    StepDigest,
)
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
        page.advance("busy" if isinstance(decision, Prefill | PrefillTogether | Decode) else "idle")
        if decision is None:
            continue
        if expected_step is not None and decision.step != expected_step:
            raise ClusterError(
                f"rank {rank} was told step {decision.step}, its next is {expected_step}"
            )
        expected_step = decision.step + 1
        if isinstance(decision, Quit):
            return
        result = executor.carry_out(decision)
        if result.logits is not None:
            # In tensor parallelism the sums over ranks are part of computing the logits.
            mx.eval(result.logits)
        if isinstance(decision, Decode) and (decision.digest or decision.state_digest):
            channel.send(_digest(rank, decision.step, result))
        page.advance("idle")


def _digest(rank: int, step: int, result: StepResult) -> StepDigest:
    return StepDigest(
        rank,
        step,
        arrived=result.arrived_digest,
        computed=result.computed_digest,
        state=result.state_digest,
    )
