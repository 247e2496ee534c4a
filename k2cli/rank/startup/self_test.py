"""Self-test before a run is ready: a prompt that all ranks compute, with equal digests.

In a pipeline each rank digests the hidden states that it received and that it sent; both sides of
each transfer must be equal. In tensor parallelism every rank computes the logits of the whole model
from its slices and from sums over all ranks; all must choose the same token. The self-test also
compiles the kernels. It is short: on a CPU each of its tokens takes as long as a token of an
answer, and the launch waits for it.
"""

from __future__ import annotations

import queue
from typing import cast

import mlx.core as mx

from k2cli.errors import ClusterError
from k2cli.pauses import Deadline
from k2cli.protocol import (
    Decode,
    JoinBatch,
    LeaveBatch,
    OpenSequence,
    Prefill,
    StepDigest,
)
from k2cli.rank.control import Followers
from k2cli.rank.engine.choice import forbid
from k2cli.rank.engine.engine import Engine
from k2cli.rank.executor import StepResult

_PROMPT = [1, 2]
_DECODED_TOKENS = 1
_SEQUENCE = 0
_BATCH = 0


def run_self_test(engine: Engine, followers: Followers, size: int, timeout_seconds: float) -> int:
    """Compute a short prompt and one token on all ranks and compare them, before any request.

    Returns:
        The size of the vocabulary: the number of tokens that the model has scores for.

    Raises:
        ClusterError: if digests differ, logits are not finite, or a rank does not answer.
    """
    engine.now(OpenSequence(engine.next_number, _SEQUENCE))
    engine.now(Prefill(engine.next_number, _SEQUENCE, _PROMPT))
    engine.now(JoinBatch(engine.next_number, _BATCH, _SEQUENCE))
    token = _PROMPT[-1] + 1
    vocabulary = 0
    for _ in range(_DECODED_TOKENS):
        number = engine.next_number
        result = engine.now(Decode(number, _BATCH, [token], digest=True, state_digest=True))
        engine.wait_for_answers()
        compare(result, _collect(followers, size, number, timeout_seconds))
        assert result.logits is not None
        token = _checked_argmax(result.logits)
        mx.eval(forbid(result.logits, [b""]))  # CUDA compiles its kernels at their first use
        vocabulary = result.logits.shape[-1]
    engine.now(LeaveBatch(engine.next_number, _BATCH, _SEQUENCE))
    return vocabulary


def _checked_argmax(logits: mx.array) -> int:
    if not bool(mx.all(mx.isfinite(logits.astype(mx.float32))).item()):
        raise ClusterError(
            "the self-test prompt gave logits that are not finite",
            "the checkpoint or the chosen --dtype is not usable; try --dtype float32",
        )
    return cast(int, mx.argmax(logits).item())


def _collect(
    followers: Followers, size: int, step: int, timeout_seconds: float
) -> dict[int, StepDigest]:
    digests: dict[int, StepDigest] = {}
    limit = Deadline(timeout_seconds)
    while len(digests) < size - 1:
        try:
            message = followers.inbox.get(timeout=limit.next_wait())
        except queue.Empty:
            if not limit.has_passed:
                continue
            missing = sorted(set(range(1, size)) - digests.keys())
            raise ClusterError(f"rank {missing} did not answer the self-test prompt") from None
        if isinstance(message, StepDigest) and message.step == step:
            digests[message.rank] = message
    return digests


def compare(leader: StepResult, followers: dict[int, StepDigest]) -> None:
    """Compare the digests of one step.

    Raises:
        ClusterError: naming the two ranks that disagree.
    """
    arrived = {0: leader.arrived_digest} | {r: d.arrived for r, d in followers.items()}
    computed = {0: leader.computed_digest} | {r: d.computed for r, d in followers.items()}
    for rank in sorted(followers):
        if followers[rank].state != leader.state_digest:
            raise ClusterError(f"self-test failed: rank {rank} holds other sequences than rank 0")
        pipeline = arrived[rank - 1] != ""
        expected = arrived[rank - 1] if pipeline else computed[0]
        if computed[rank] != expected:
            what = "sent other hidden states than reached" if pipeline else "disagrees with"
            raise ClusterError(
                f"self-test failed: rank {rank} {what} rank {rank - 1 if pipeline else 0}",
                "check that every node has the same checkpoint, mlx and mlx-lm",
            )
