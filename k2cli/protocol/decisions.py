"""Messages between the leader rank and a follower rank: decisions, and the follower's answers.

Every decision carries the step that it applies to. A follower reports what it holds and digests of
what it computed.
"""

from __future__ import annotations

from typing import Annotated

import msgspec

from k2cli.protocol.message import Heartbeat, Message


class OpenSequence(Message, tag=True, frozen=True):
    """Make a KV cache for a sequence: empty, or with the first tokens of a kept prefix.

    The tokens of a prefix are those of its parents, from the root on, and then its own. Nodes of it
    in ``release``, the lowest first, are dropped meanwhile: there is no room for them beside it.
    """

    step: int
    sequence: int
    prefix: int | None = None
    kept_tokens: int = 0
    release: list[int] = msgspec.field(default_factory=list)


class Prefill(Message, tag=True, frozen=True):
    """Compute a chunk of a sequence's prompt; only its KV cache matters.

    ``marks`` asks for marks of the hidden states (the link check).
    """

    step: int
    sequence: int
    tokens: list[int]
    marks: bool = False


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
    rows and steps that it holds (the periodic check), ``marks`` for marks of the hidden states or
    logits and a digest of the batch's KV caches (the link check).

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
    marks: bool = False
    drafts: list[int] = msgspec.field(default_factory=list)


class CutBack(Message, tag=True, frozen=True):
    """Remove the last tokens from the KV cache of a batch's only row: drafts that are wrong."""

    step: int
    batch: int
    tokens: int


class LeaveBatch(Message, tag=True, frozen=True):
    """Move a sequence from a batch into another batch, or remove it.

    ``keep_as`` keeps its KV cache as a prefix with that id, from token ``keep_from`` on: the ones
    before are those of the prefix ``keep_below``. ``told`` is the input of its last step if that
    step was decided ahead, else -1.
    """

    step: int
    batch: int
    sequence: int
    keep_as: int | None = None
    keep_below: int | None = None
    keep_from: int = 0
    move_to: int | None = None
    told: int = -1


class CloseSequence(Message, tag=True, frozen=True):
    """Free the KV cache of a sequence in prefill, or keep it as a prefix as ``LeaveBatch`` does."""

    step: int
    sequence: int
    keep_as: int | None = None
    keep_below: int | None = None
    keep_from: int = 0


class SplitPrefix(Message, tag=True, frozen=True):
    """Make the first ``tokens`` of a prefix's own ones a prefix ``above`` it, its new parent."""

    step: int
    prefix: int
    above: int
    tokens: int


class DropPrefix(Message, tag=True, frozen=True):
    """Free a kept prefix, which is no parent."""

    step: int
    prefix: int


BlockName = Annotated[str, msgspec.Meta(pattern=r"\A[0-9a-f]{32}/[0-9a-f]{32}\Z")]
"""Name of a block of tokens in the prefix cache on disk: of its scope's folder, and its own."""

StoreName = Annotated[str, msgspec.Meta(pattern=r"\A[0-9a-f]{32}\Z")]
"""Name of the folder of a run's blocks: equal if model, placement, types and versions are."""


class OpenStore(Message, tag=True, frozen=True):
    """Open the prefix cache on disk, and report the blocks that are there.

    Blocks of other runs give way so that all together take ``limit_bytes``.
    """

    step: int
    folder: StoreName
    limit_bytes: int


class StoreBlock(Message, tag=True, frozen=True):
    """Write the caches of a block of a kept prefix's tokens, which begins with token ``first``."""

    step: int
    prefix: int
    first: int
    block: BlockName


class ReadBlocks(Message, tag=True, frozen=True):
    """Begin to read consecutive blocks; ``AdoptBlocks`` with the same ``reading`` follows.

    ``used`` is the time that is recorded as the last use of the first of them, and a bit less for
    each later one.
    """

    step: int
    reading: int
    blocks: list[BlockName]
    used: float


class AdoptBlocks(Message, tag=True, frozen=True):
    """Keep the tokens of the first ``count`` blocks that were read, but for the first ``skip``.

    They become the prefix ``keep_as`` with these ``tokens``, below ``keep_below``. Without it they
    are released.
    """

    step: int
    reading: int
    count: int = 0
    skip: int = 0
    keep_as: int | None = None
    keep_below: int | None = None
    tokens: list[int] = msgspec.field(default_factory=list)


class ForgetBlocks(Message, tag=True, frozen=True):
    """Remove blocks from the disk."""

    step: int
    blocks: list[BlockName]


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
    | SplitPrefix
    | DropPrefix
    | OpenStore
    | StoreBlock
    | ReadBlocks
    | AdoptBlocks
    | ForgetBlocks
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
    """All tensors that a rank has loaded and evaluated; the leader checks that none is missing.

    ``identity`` is a digest of the model's files and the kinds of caches, for the prefix cache on
    disk; empty if there is none.
    """

    rank: int
    tensors: list[HeldTensor]
    identity: str = ""


class Marks(msgspec.Struct, frozen=True, array_like=True):
    """Marks of an array ``[positions, width]``, by which two of them are compared.

    ``checksums`` has the CRC-32 of each position's bytes, ``norms`` its length as a vector, and
    ``projections`` its products with fixed vectors of signs: of two arrays that need not be equal
    to the bit, these say how much they differ.
    """

    checksums: list[int]
    norms: list[float]
    projections: list[list[float]]


class StepDigest(Message, tag=True, frozen=True):
    """Digests (hex) and marks of the input and the result of a rank's step.

    In a pipeline these are the hidden states that arrived and left. In tensor parallelism nothing
    arrives, and the result is the chosen token. ``state`` is the digest of the ids, rows and steps
    that the rank holds, ``caches`` that of a batch's KV caches on this rank. The result of the last
    layer is marked where nothing is sent. Fields that were not asked for are empty.
    """

    rank: int
    step: int
    arrived: str = ""
    computed: str = ""
    state: str = ""
    arrived_marks: Marks | None = None
    computed_marks: Marks | None = None
    caches: str = ""


class BlocksFound(Message, tag=True, frozen=True):
    """The blocks that a rank has on disk, with their bytes and the time of their last use.

    ``usable`` is False if its folder cannot be used: then no rank uses its own.
    """

    rank: int
    blocks: list[tuple[BlockName, int, float]]
    usable: bool = True


class BlockWritten(Message, tag=True, frozen=True):
    """A block is on a rank's disk in ``nbytes``, or could not be written: ``error``."""

    rank: int
    block: BlockName
    nbytes: int = 0
    error: str = ""


class BlocksRead(Message, tag=True, frozen=True):
    """The first ``count`` blocks of a reading are whole; the next, if any, is not, and removed."""

    rank: int
    reading: int
    count: int


StoreReport = BlocksFound | BlockWritten | BlocksRead

FollowerMessage = Hello | Holdings | StepDigest | StoreReport | Heartbeat
