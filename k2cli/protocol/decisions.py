"""Leader rank <-> a follower rank: decisions out, what it holds and computed back.

Every decision carries the step that it applies to.
"""

from __future__ import annotations

import msgspec

from k2cli.protocol.message import Heartbeat, Message


class OpenSequence(Message, tag=True, frozen=True):
    """Make a KV cache for a sequence: empty, or the first tokens of a kept prefix."""

    step: int
    sequence: int
    prefix: int | None = None
    kept_tokens: int = 0


class Prefill(Message, tag=True, frozen=True):
    """Compute a chunk of a sequence's prompt; only its KV cache matters."""

    step: int
    sequence: int
    tokens: list[int]


class PrefillTogether(Message, tag=True, frozen=True):
    """Compute several whole prompts at once, and make their sequences rows of a decode batch.

    ``tokens[i]`` is the prompt of ``sequences[i]`` without its last token; none is empty, and the
    sequences are fresh.
    """

    step: int
    batch: int
    sequences: list[int]
    tokens: list[list[int]]


class JoinBatch(Message, tag=True, frozen=True):
    """Make a sequence the last row of a decode batch, which is made if there is none."""

    step: int
    batch: int
    sequence: int


class Decode(Message, tag=True, frozen=True):
    """Compute one token per row of a batch, and the logits after it.

    ``tokens`` are the inputs, one per row. With ``ahead`` it is empty: the inputs are what the
    leader chooses in this batch's step before, which is still being computed, and they come over
    the MLX group; ``told`` of a later decision says which they were (-1: nothing to tell).
    ``digest`` asks for digests of what the rank computed (the self-test), ``state_digest`` for one
    of what it holds (the periodic check).
    """

    step: int
    batch: int
    tokens: list[int]
    digest: bool = False
    state_digest: bool = False
    ahead: bool = False
    told: list[int] = msgspec.field(default_factory=list)


class LeaveBatch(Message, tag=True, frozen=True):
    """Take a sequence out of a batch: into another batch, or for good.

    ``keep_as`` keeps its KV cache as a prefix of that id. ``told`` is the input of its last step
    if that was decided ahead, else -1.
    """

    step: int
    batch: int
    sequence: int
    keep_as: int | None = None
    move_to: int | None = None
    told: int = -1


class CloseSequence(Message, tag=True, frozen=True):
    """Drop the KV cache of a sequence in prefill, or keep it as a prefix."""

    step: int
    sequence: int
    keep_as: int | None = None


class DropPrefix(Message, tag=True, frozen=True):
    """Forget a kept prefix."""

    step: int
    prefix: int


class Tick(Message, tag=True, frozen=True):
    """Nothing to do; proves that leader and connection live."""

    step: int


class Quit(Message, tag=True, frozen=True):
    """The leader ends in good order."""

    step: int


Decision = (
    OpenSequence
    | Prefill
    | PrefillTogether
    | JoinBatch
    | Decode
    | LeaveBatch
    | CloseSequence
    | DropPrefix
    | Tick
    | Quit
)


class HeldTensor(msgspec.Struct, frozen=True, array_like=True):
    """A tensor that a rank holds: its name in the model, shape on this rank, dtype and bytes."""

    name: str
    shape: list[int]
    dtype: str
    nbytes: int


class Hello(Message, tag=True, frozen=True):
    """First message on a control connection: which follower this is."""

    rank: int


class Holdings(Message, tag=True, frozen=True):
    """Everything that a rank has loaded and evaluated: its part of the coverage proof."""

    rank: int
    tensors: list[HeldTensor]


class StepDigest(Message, tag=True, frozen=True):
    """Digests (hex) of what a rank was handed in a step and of what it computed.

    In a pipeline that is the hidden states that arrived and departed; in tensor parallelism
    nothing arrives, and the digest is of the chosen token. ``state`` is of ids, rows and steps:
    what the rank believes to hold. Fields that were not asked for are empty.
    """

    rank: int
    step: int
    arrived: str = ""
    computed: str = ""
    state: str = ""


FollowerMessage = Hello | Holdings | StepDigest | Heartbeat
