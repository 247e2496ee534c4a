"""Main loop of a follower rank: receive a decision, carry it out, repeat.

In tensor parallelism a follower builds and starts a step before it waits for the previous one, as
the leader does: the leader may decide one step ahead, and the GPU must not idle while Python works.
"""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx

from k2cli.errors import ClusterError
from k2cli.protocol import (
    Decision,
    Decode,
    FollowerMessage,
    Prefill,
    PrefillTogether,
    Quit,
    StepDigest,
    Warm,
    WarmUp,
)
from k2cli.protocol.wire import Channel
from k2cli.rank.executor import Advance, Executor, StepResult

_IDLE_SECONDS = 0.5
# Time to wait for another decision while a step is being computed. After that the follower waits
# for the step, so that the progress page shows its end, or that it hangs.
_NEXT_SECONDS = 0.02


def follow(
    channel: Channel[Decision],
    executor: Executor,
    advance: Advance,
    rank: int,
    on_warm_up: Callable[[WarmUp | Warm], None] = lambda decision: None,
    send: Callable[[FollowerMessage], None] | None = None,
) -> None:
    """Carry out the leader's decisions until it sends Quit.

    Args:
        advance: is called at each step.
        on_warm_up: receives what the leader says about the warm-up.
        send: sends to the leader, if other threads do so too.

    Raises:
        ClusterError: if a decision is out of order.
        ConnectionLost: if the leader is gone.
    """
    expected_step: int | None = None
    computing: mx.array | None = None
    while True:
        decision = channel.receive(_IDLE_SECONDS if computing is None else _NEXT_SECONDS)
        if decision is None:
            _wait_for(computing, executor)
            computing = None
            advance("idle")
            continue
        computes = isinstance(decision, Prefill | PrefillTogether | Decode)
        advance("busy" if computes or computing is not None else "idle")
        if expected_step is not None and decision.step != expected_step:
            raise ClusterError(
                f"rank {rank} was told step {decision.step}, its next is {expected_step}"
            )
        expected_step = decision.step + 1
        if isinstance(decision, Quit):
            return
        result = executor.carry_out(decision)
        if result.logits is not None:
            # The sums over tensor ranks are part of computing the logits.
            mx.async_eval(*result.to_compute)  # type: ignore[no-untyped-call]
            _wait_for(computing, executor)
            computing = result.logits
        if _wants_digest(decision):
            (send or channel.send)(_digest(rank, decision.step, result))
        if isinstance(decision, WarmUp | Warm):
            on_warm_up(decision)
        advance("idle" if computing is None else executor.phase)


def _wait_for(computing: mx.array | None, executor: Executor) -> None:
    if computing is not None:
        executor.about_to_wait()
        mx.eval(computing)


def _wants_digest(decision: Decision) -> bool:
    if isinstance(decision, Decode):
        return decision.digest or decision.state_digest
    return isinstance(decision, Prefill) and decision.marks


def _digest(rank: int, step: int, result: StepResult) -> StepDigest:
    return StepDigest(
        rank,
        step,
        arrived=result.arrived_digest,
        computed=result.computed_digest,
        state=result.state_digest,
        arrived_marks=result.arrived_marks,
        computed_marks=result.computed_marks,
        caches=result.cache_digest,
    )
