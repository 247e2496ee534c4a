"""The document of ``GET /v1/status``, as ``k2 top`` and ``k2 ps`` read it from a server.

The server may be of another version of k2, or be none of k2: fields that are absent have a default,
unknown ones are ignored, and those of another type are refused. docs/reference/contracts.md
describes the fields.
"""

from __future__ import annotations

from typing import Annotated, Any

import msgspec

_Count = Annotated[int, msgspec.Meta(ge=0, le=2**53)]


class StatusModel(msgspec.Struct, frozen=True):
    """The served model."""

    name: str


class StatusLink(msgspec.Struct, frozen=True):
    """The connection of the ranks."""

    transport: str = ""
    strategy: str = ""
    reason: str = ""
    interfaces: list[str] = []


class StatusMemory(msgspec.Struct, frozen=True):
    """Memory of a rank in bytes; 0 for what is not known."""

    used_bytes: _Count = 0
    kept_bytes: _Count = 0
    peak_bytes: _Count = 0
    resident_bytes: _Count = 0
    planned_bytes: _Count = 0
    limit_bytes: _Count = 0


class StatusRank(msgspec.Struct, frozen=True):
    """One rank. ``layers`` is a half-open range."""

    rank: _Count
    node: str
    device: str = ""
    gpu: str = ""
    layers: Annotated[list[_Count], msgspec.Meta(min_length=2, max_length=2)] | None = None
    phase: str = ""
    progress_age_seconds: float | None = None
    loaded_bytes: _Count = 0
    load_bytes: _Count = 0
    memory: StatusMemory = StatusMemory()


class StatusKvCache(msgspec.Struct, frozen=True):
    """Use of the plan's KV cache, in tokens."""

    budget_tokens: _Count = 0
    reserved_tokens: _Count = 0
    prefix_tokens: _Count = 0
    prefixes: _Count = 0


class StatusRequest(msgspec.Struct, frozen=True):
    """One request in progress. ``queue_position`` is 1 for the next one."""

    id: str
    dialect: str = ""
    key: str = ""
    state: str = ""
    queue_position: _Count | None = None
    prompt_tokens_done: _Count = 0
    prompt_tokens: _Count = 0
    cached_tokens: _Count = 0
    generated_tokens: _Count = 0
    tokens_per_second: float | None = None
    age_seconds: float = 0.0


class StatusRequests(msgspec.Struct, frozen=True):
    """Requests in progress by state, and some of them."""

    reading: _Count = 0
    queued: _Count = 0
    prefill: _Count = 0
    decode: _Count = 0
    oldest_wait_seconds: float = 0.0
    listed: list[StatusRequest] = []


class StatusCount(msgspec.Struct, frozen=True):
    """The number of values of a histogram."""

    count: _Count = 0


class StatusTotals(msgspec.Struct, frozen=True):
    """Counts since the API began. ``queue`` counts the requests that the engine has started."""

    requests: dict[str, _Count] = {}
    prompt_tokens: _Count = 0
    cached_tokens: _Count = 0
    cache_hit_share: float | None = None
    cache_hits: _Count | None = None
    queue: StatusCount = StatusCount()


class StatusThroughput(msgspec.Struct, frozen=True):
    """Present rates in tokens per second."""

    completion_tokens_per_second: float = 0.0
    prompt_tokens_per_second: float = 0.0


class StatusDocument(msgspec.Struct, frozen=True):
    """A run at one moment. ``attempt`` is the number of its present start, from 1."""

    model: StatusModel
    state: str
    ranks: list[StatusRank]
    requests: StatusRequests
    throughput: StatusThroughput
    run_id: str = ""
    version: str = ""
    cause: str = ""
    uptime_seconds: float = 0.0
    attempt: _Count = 1
    link: StatusLink = StatusLink()
    kv_cache: StatusKvCache | None = None
    totals: StatusTotals = StatusTotals()


def status_document(document: dict[str, Any]) -> StatusDocument:
    """Read a status.

    Raises:
        msgspec.ValidationError: if the document is not one.
    """
    return msgspec.convert(document, StatusDocument)
