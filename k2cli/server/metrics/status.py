"""The document of ``GET /v1/status``. docs/reference/contracts.md describes it."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from k2cli.protocol import KvCacheUse
from k2cli.server.errors import without_folders
from k2cli.server.metrics.request_record import RequestRecord, Stage
from k2cli.server.metrics.run_view import RankView, RunView, ShownState
from k2cli.server.metrics.snapshot import Snapshot
from k2cli.server.metrics.totals import (
    GENERATING,
    RATE_SECONDS,
    RESULTS,
    Dialect,
    Histogram,
    Result,
    Totals,
)
from k2cli.server.served_model import ServedModel

SCHEMA_VERSION = 1
MAX_LISTED = 100
"""Requests that the document lists; all of them are counted."""

_LISTED_FIRST: tuple[Stage, ...] = ("decode", "prefill", "queued", "reading")


class Model(msgspec.Struct, frozen=True):
    """The served model."""

    name: str
    aliases: list[str]
    context_length: int


class Link(msgspec.Struct, frozen=True):
    """The connection of the ranks, and the reason for it; both empty for what is not known."""

    transport: str
    strategy: str
    reason: str
    interfaces: list[str]


class Memory(msgspec.Struct, frozen=True):
    """Memory of a rank in bytes; see ``run_view.RankView``. The last four are parts of the plan."""

    used_bytes: int
    kept_bytes: int
    peak_bytes: int
    resident_bytes: int
    planned_bytes: int
    limit_bytes: int
    weights_bytes: int
    kv_cache_bytes: int
    activation_bytes: int
    overhead_bytes: int


class Rank(msgspec.Struct, frozen=True):
    """One rank. ``layers`` is a half-open range; the loaded bytes are those of its weights."""

    rank: int
    node: str
    device: str
    gpu: str
    layers: list[int] | None
    phase: str
    steps: int
    progress_age_seconds: float | None
    loaded_bytes: int
    load_bytes: int
    memory: Memory


class Request(msgspec.Struct, frozen=True):
    """One request in progress. ``id`` is opaque; ``queue_position`` is 1 for the next one."""

    id: str
    dialect: Dialect
    key: str
    state: Stage
    queue_position: int | None
    prompt_tokens_done: int
    prompt_tokens: int
    cached_tokens: int
    generated_tokens: int
    tokens_per_second: float | None
    age_seconds: float


class KvCache(msgspec.Struct, frozen=True):
    """Use of the plan's KV cache, in tokens. Requests take the room of kept prefixes."""

    budget_tokens: int
    reserved_tokens: int
    prefix_tokens: int
    prefixes: int


class Requests(msgspec.Struct, frozen=True):
    """Requests in progress by state. ``listed`` has at most ``MAX_LISTED``, generating first."""

    reading: int
    queued: int
    prefill: int
    decode: int
    oldest_wait_seconds: float
    listed: list[Request]


class Latency(msgspec.Struct, frozen=True):
    """Mean of a time in seconds, over ``count`` values; None if there are none."""

    count: int
    mean_seconds: float | None


class TotalCounts(msgspec.Struct, frozen=True):
    """Counts since the API began. ``requests`` are those for answers, by result."""

    requests: dict[Result, int]
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    reasoning_tokens: int
    cache_hit_share: float | None
    cache_hits: int
    queue: Latency
    first_token: Latency
    inter_token: Latency
    draft_tokens: int
    accepted_draft_tokens: int


class Throughput(msgspec.Struct, frozen=True):
    """Tokens per second over the last ``window_seconds``; prompts without reused tokens."""

    window_seconds: int
    completion_tokens_per_second: float
    prompt_tokens_per_second: float


class Status(msgspec.Struct, frozen=True):
    """A run at one moment. ``began`` is the start of its API, in seconds since the epoch."""

    schema_version: int
    run_id: str
    version: str
    model: Model
    state: ShownState
    cause: str
    began: float
    uptime_seconds: float
    attempt: int
    link: Link
    ranks: list[Rank]
    kv_cache: KvCache | None
    requests: Requests
    totals: TotalCounts
    throughput: Throughput


def status_of(snapshot: Snapshot, served: ServedModel) -> Status:
    """Describe a run and its requests."""
    run, activity = snapshot.run, snapshot.activity
    return Status(
        SCHEMA_VERSION,
        run.run_id,
        run.version,
        Model(served.name, list(served.aliases), served.context_length),
        run.state,
        without_folders(run.cause),
        round(activity.began, 3),
        round(snapshot.uptime_seconds, 3),
        run.attempt,
        _link(run),
        [_rank(rank) for rank in run.ranks],
        _kv_cache(run.cache_use),
        _requests(snapshot),
        _totals(activity.totals),
        Throughput(
            RATE_SECONDS,
            round(activity.totals.completion_rate.per_second(snapshot.now), 3),
            round(activity.totals.prompt_rate.per_second(snapshot.now), 3),
        ),
    )


def _link(run: RunView) -> Link:
    return Link(run.transport, run.strategy, run.transport_reason, list(run.interfaces))


def _rank(rank: RankView) -> Rank:
    age = rank.progress_seconds
    return Rank(
        rank.rank,
        rank.node,
        rank.device,
        rank.gpu,
        None if rank.layers is None else list(rank.layers),
        rank.phase,
        rank.steps,
        None if age is None else round(age, 3),
        rank.loaded_bytes,
        rank.load_bytes,
        Memory(
            rank.used_bytes,
            rank.kept_bytes,
            rank.peak_bytes,
            rank.resident_bytes,
            rank.planned_bytes,
            rank.limit_bytes,
            rank.planned_weights_bytes,
            rank.planned_cache_bytes,
            rank.planned_activation_bytes,
            rank.planned_overhead_bytes,
        ),
    )


def _kv_cache(use: KvCacheUse | None) -> KvCache | None:
    if use is None:
        return None
    return KvCache(use.budget_tokens, use.reserved_tokens, use.prefix_tokens, use.prefixes)


def _requests(snapshot: Snapshot) -> Requests:
    stages, positions = snapshot.stages, snapshot.positions

    def order(record: RequestRecord) -> tuple[int, int]:
        return _LISTED_FIRST.index(record.stage), positions.get(record.engine_id, 0)

    listed = sorted(snapshot.requests, key=order)[:MAX_LISTED]
    return Requests(
        stages["reading"],
        stages["queued"],
        stages["prefill"],
        stages["decode"],
        round(snapshot.oldest_wait_seconds, 3),
        [_request(record, positions, snapshot.now) for record in listed],
    )


def _request(record: RequestRecord, positions: Mapping[str, int], now: float) -> Request:
    return Request(
        record.id,
        record.dialect,
        record.key,
        record.stage,
        positions.get(record.engine_id) if record.stage == "queued" else None,
        record.prompt_done,
        record.prompt_tokens,
        record.cached_tokens,
        record.generated_tokens,
        _rounded(record.tokens_per_second(now)),
        round(now - record.began, 3),
    )


def _totals(totals: Totals) -> TotalCounts:
    keys = totals.by_key.values()
    counted = {
        result: sum(key.requests[dialect, result] for key in keys for dialect in GENERATING)
        for result in RESULTS
    }
    prompt = sum(key.prompt_tokens[dialect] for key in keys for dialect in GENERATING)
    cached = sum(key.cached_tokens[dialect] for key in keys for dialect in GENERATING)
    return TotalCounts(
        counted,
        prompt,
        cached,
        sum(key.completion_tokens[dialect] for key in keys for dialect in GENERATING),
        sum(key.reasoning_tokens[dialect] for key in keys for dialect in GENERATING),
        _rounded(cached / prompt if prompt else None),
        sum(key.cache_hits[dialect] for key in keys for dialect in GENERATING),
        _latency([key.queue_seconds for key in keys]),
        _latency([key.first_token_seconds for key in keys]),
        _latency([key.inter_token_seconds for key in keys]),
        sum(key.draft_tokens[dialect] for key in keys for dialect in GENERATING),
        sum(key.accepted_tokens[dialect] for key in keys for dialect in GENERATING),
    )


def _latency(histograms: list[Histogram]) -> Latency:
    count = sum(histogram.count for histogram in histograms)
    seconds = sum(histogram.sum for histogram in histograms)
    return Latency(count, _rounded(seconds / count if count else None))


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 6)
