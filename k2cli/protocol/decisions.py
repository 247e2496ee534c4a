"""Messages between the leader rank and a follower rank: decisions, and the follower's answers.

Every decision carries the step that it applies to. A follower reports what it holds and digests of
what it computed.
"""

from __future__ import annotations

import msgspec

from k2cli.protocol.message import Heartbeat, Message


class OpenSequence(Message, tag=True, frozen=True):
    """Make a KV cache for a sequence: empty, or with the first tokens of a kept prefix."""

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

    ``tokens[i]`` is the prompt of ``sequences[i]`` without its last token. No prompt is empty, and
    the sequences have no KV cache yet.
    """

    step: int
    batch: int
    sequences: list[int]
    tokens: list[list[int]]


class JoinBatch(Message, tag=True, frozen=True):
    """Make a sequence the last row of a decode batch; create the batch if there is none."""

    step: int
    batch: int
    sequence: int


class Decode(Message, tag=True, frozen=True):
    """Compute one token per row of a batch, and the logits after it.

    ``tokens`` are the inputs, one per row. With ``ahead`` it is empty: the inputs are the tokens
    that the leader chooses in this batch's previous step, which is still being computed, and they
    travel over the MLX group; ``told`` of a later decision repeats them (-1: none). ``digest`` asks
    for digests of what the rank computed (the self-test), ``state_digest`` for a digest of the ids,
    rows and steps that it holds (the periodic check).

    ``drafts`` are guesses of the tokens after the input of the only row, which is not decided
    ahead. They are computed with it, with logits after each, and a ``CutBack`` follows for those
    that are wrong.
    """

    step: int
    batch: int
    tokens: list[int]
    digest: bool = False
    state_digest: bool = False
    ahead: bool = False
    told: list[int] = msgspec.field(default_factory=list)
    drafts: list[int] = msgspec.field(default_factory=list)


class CutBack(Message, tag=True, frozen=True):
    """Remove the last tokens from the KV cache of a batch's only row: drafts that are wrong."""

    step: int
    batch: int
    tokens: int


class LeaveBatch(Message, tag=True, frozen=True):
    """Move a sequence from a batch into another batch, or remove it.

    ``keep_as`` keeps its KV cache as a prefix with that id. ``told`` is the input of its last step
    if that step was decided ahead, else -1.
    """

    step: int
    batch: int
    sequence: int
    keep_as: int | None = None
    move_to: int | None = None
    told: int = -1


class CloseSequence(Message, tag=True, frozen=True):
    """Free the KV cache of a sequence in prefill, or keep it as a prefix."""

    step: int
    sequence: int
    keep_as: int | None = None


class DropPrefix(Message, tag=True, frozen=True):
    """Free a kept prefix."""

    step: int
    prefix: int


class WarmUp(Message, tag=True, frozen=True):
    """The next steps warm up a shape, the ``number``-th of ``count`` (0: not known yet)."""

    step: int
    shape: str
    number: int = 0
    count: int = 0


class Warm(Message, tag=True, frozen=True):
    """The warm-up is over: what follows are requests."""

    step: int


class Tick(Message, tag=True, frozen=True):
    """Sign of life of leader and connection; nothing to compute."""

    step: int


class Quit(Message, tag=True, frozen=True):
    """Orderly end of the leader."""

    step: int


Decision = (
    OpenSequence
    | Prefill
    | PrefillTogether
    | JoinBatch
    | Decode
    | CutBack
    | LeaveBatch
    | CloseSequence
    | DropPrefix
    | WarmUp
    | Warm
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
    """First message on a control connection; names the follower."""

    rank: int


class Holdings(Message, tag=True, frozen=True):
    """All tensors that a rank has loaded and evaluated; the leader checks that none is missing."""

    rank: int
    tensors: list[HeldTensor]


class StepDigest(Message, tag=True, frozen=True):
    """Digests (hex) of the input and the result of a rank's step.

    In a pipeline these are the hidden states that arrived and left. In tensor parallelism nothing
    arrives, and the result is the chosen token. ``state`` is the digest of the ids, rows and steps
    that the rank holds. Fields that were not asked for are empty.
    """

    rank: int
    step: int
    arrived: str = ""
    computed: str = ""
    state: str = ""


FollowerMessage = Hello | Holdings | StepDigest | Heartbeat
