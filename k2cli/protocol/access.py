"""Named keys as the leader's guard gets them: digests and limits, and never a key."""

from __future__ import annotations

from typing import Annotated

import msgspec

from k2cli.protocol.message import Message

KeyName = Annotated[str, msgspec.Meta(pattern=r"\A[A-Za-z0-9][A-Za-z0-9._@-]{0,63}\Z")]
_KeyId = Annotated[str, msgspec.Meta(pattern=r"\A[0-9a-f]{8}\Z")]
_Digest = Annotated[str, msgspec.Meta(pattern=r"\A[0-9a-f]{64}\Z")]
_Time = Annotated[float, msgspec.Meta(ge=0, le=1e11)]
_Count = Annotated[int, msgspec.Meta(ge=0, le=10**9)]
_Positive = Annotated[int, msgspec.Meta(ge=1, le=10**9)]


class KeyLimits(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Limits of what one key may do at a time; None is no limit.

    ``max_concurrent`` requests are in the engine at once, and ``max_queued`` more wait for that.
    ``tokens_per_minute`` counts tokens that were computed: prompts without what came from a cache,
    and answers.
    """

    max_concurrent: _Positive | None = None
    max_queued: _Count | None = None
    tokens_per_minute: _Positive | None = None


class NamedKey(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A key by its SHA-256 (hex). Times are seconds since the epoch; ``expires`` None is never.

    ``key_id`` is short, random and no secret: it tells one key's requests and caches from another's
    in messages, where a name could be a person's. ``monitors``: it may read the status and the
    metrics of a run, which show the use of all keys.
    """

    name: KeyName
    key_id: _KeyId
    digest: _Digest
    created: _Time
    expires: _Time | None = None
    limits: KeyLimits = KeyLimits()
    monitors: bool = False


class NamedKeys(Message, tag=True, frozen=True):
    """Replace the named keys that a run accepts. Requests under a key that is gone are ended."""

    keys: list[NamedKey]
