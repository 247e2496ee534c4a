"""A follower rank's main loop: receive a decision, carry it out, next.

In tensor parallelism a step is laid out and started before the one before it is waited for, as on
the leader: the leader may decide one step ahead, and the GPU must not idle while Python works.
"""

from __future__ import annotations

import mlx.core as mx

from k2cli.errors import ClusterError
from k2cli.protocol import (
    Decision,
    Decode,
    Prefill,
    PrefillTogether,
    Quit,
    StepDigest,
)
from k2cli.protocol.progress_page import ProgressPage
from k2cli.protocol.wire import Channel
from k2cli.rank.executor import Executor, StepResult

_IDLE_SECONDS = 0.5
# How long the next decision may take while a step is being computed, before that step is waited
# for: then its end, or that there is none, shows on the progress page.
_NEXT_SECONDS = 0.02


def follow(channel: Channel[Decision], executor: Executor, page: ProgressPage, rank: int) -> None:
    """Do what the leader decides until it says quit.

    Raises:
        ClusterError: if a decision is out of order.
        ConnectionLost: if the leader is gone.
    """
    expected_step: int | None = None
    computing: mx.array | None = None
    while True:
        decision = channel.receive(_IDLE_SECONDS if computing is None else _NEXT_SECONDS)
        if decision is None:
            _wait_for(computing)
            computing = None
            page.advance("idle")
            continue
        computes = isinstance(decision, Prefill | PrefillTogether | Decode)
        page.advance("busy" if computes or computing is not None else "idle")
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
            mx.async_eval(*result.to_compute)  # type: ignore[no-untyped-call]
            _wait_for(computing)
            computing = result.logits
        if isinstance(decision, Decode) and (decision.digest or decision.state_digest):
            channel.send(_digest(rank, decision.step, result))
        page.advance("idle" if computing is None else "busy")


def _wait_for(computing: mx.array | None) -> None:
    if computing is not None:
        mx.eval(computing)


def _digest(rank: int, step: int, result: StepResult) -> StepDigest:
    return StepDigest(
        rank,
        step,
        arrived=result.arrived_digest,
        computed=result.computed_digest,
        state=result.state_digest,
    )
