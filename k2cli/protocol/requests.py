"""Messages about a client's request, between the API and the leader rank."""

from __future__ import annotations

from typing import Literal

import msgspec

from k2cli.protocol.message import Message

FinishReason = Literal["stop", "length", "cancelled"]


class Sampling(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Sampling options. Temperature 0 is greedy; top_k 0 and top_p 1 are off."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = {}
    top_logprobs: int | None = None


class Grammar(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A grammar that an answer must obey, in the form of ``grammars.text``.

    ``prefix`` is the beginning of the answer that the prompt ends with; it belongs to the text that
    the grammar describes.
    """

    text: str
    prefix: str = ""


class Generate(Message, tag=True, frozen=True):
    """A validated request for the leader rank. ``stop_tokens`` end it and are not returned.

    ``owner`` is the id of the named key that asks, "" for the run's own. The cache of an earlier
    prompt is used only if that had the same ``prefix_scope``. ``use_speculation`` False lets every
    step compute one token of the answer. ``stores_prefix`` False keeps what it leaves off disks.
    """

    request_id: str
    prompt: list[int]
    max_tokens: int
    sampling: Sampling = Sampling()
    stop_tokens: list[int] = msgspec.field(default_factory=list)
    use_prefix_cache: bool = True
    grammar: Grammar | None = None
    owner: str = ""
    prefix_scope: str = ""
    use_speculation: bool = True
    stores_prefix: bool = True


class Cancel(Message, tag=True, frozen=True):
    """Cancel a request."""

    request_id: str


class PromptProgress(Message, tag=True, frozen=True):
    """Count of prompt tokens computed; ``cached`` of them were reused."""

    request_id: str
    done: int
    total: int
    cached: int = 0


class TokenLogprob(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Natural-log probability of the chosen token and of the best alternatives."""

    logprob: float
    top: list[tuple[int, float]] = []


class Tokens(Message, tag=True, frozen=True):
    """Newly generated token ids; ``logprobs`` has one entry per token, or none if not asked for."""

    request_id: str
    tokens: list[int]
    logprobs: list[TokenLogprob] = msgspec.field(default_factory=list)


class Finished(Message, tag=True, frozen=True):
    """Result of a completed request. Prefill seconds include the first token.

    ``pauses`` counts how often it was stopped for another request and continued; the seconds of
    that are ``paused_seconds``, and are also part of those of prefill or decode. ``draft_tokens``
    were guessed, and ``accepted_tokens`` of them are part of the answer.
    """

    request_id: str
    reason: FinishReason
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    queue_seconds: float
    prefill_seconds: float
    decode_seconds: float
    pauses: int = 0
    paused_seconds: float = 0.0
    draft_tokens: int = 0
    accepted_tokens: int = 0


class Paused(Message, tag=True, frozen=True):
    """A running request was stopped for another one, and will go on later."""

    request_id: str


class WaitingOrder(Message, tag=True, frozen=True):
    """The requests that wait in the engine, in the order in which they would start now."""

    request_ids: list[str]


class RequestFailed(Message, tag=True, frozen=True):
    """An error that ended one request. The engine goes on."""

    request_id: str
    error: str
    kind: Literal["invalid", "capacity", "internal"] = "internal"
