"""The metrics of a run in the text formats of Prometheus and OpenMetrics.

The only module that imports prometheus_client, and only when metrics are asked for. Label values
are names of k2 and of the cluster's owner; none is a client's text.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import cast

from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from prometheus_client.exposition import generate_latest as plain_text
from prometheus_client.metrics_core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.openmetrics.exposition import CONTENT_TYPE_LATEST
from prometheus_client.openmetrics.exposition import generate_latest as openmetrics_text
from prometheus_client.registry import Collector, CollectorRegistry
from prometheus_client.utils import floatToGoString

from k2cli.server.metrics.run_view import RankView, RunView
from k2cli.server.metrics.snapshot import Snapshot
from k2cli.server.metrics.totals import (
    FINISH_REASONS,
    GENERATING,
    RESULTS,
    Dialect,
    Histogram,
    KeyTotals,
)

_OPENMETRICS = "application/openmetrics-text"


def exposition(snapshot: Snapshot, accept: str) -> tuple[bytes, str]:
    """Return the text of all metrics and its content type.

    Args:
        snapshot: the run and its requests now.
        accept: the header ``Accept``; OpenMetrics is sent if it is named there.
    """
    registry = CollectorRegistry()
    registry.register(RunCollector(snapshot))
    kinds = [kind.split(";")[0].strip().lower() for kind in accept.split(",")]
    if _OPENMETRICS in kinds:
        text: bytes = openmetrics_text(registry)  # type: ignore[no-untyped-call]
        return text, CONTENT_TYPE_LATEST
    return plain_text(registry), CONTENT_TYPE_PLAIN_0_0_4


class RunCollector(Collector):
    """Collector of the metrics of one run at one moment."""

    def __init__(self, snapshot: Snapshot) -> None:
        self._snapshot = snapshot

    def collect(self) -> Iterator[Metric]:
        """Yield all metrics."""
        yield from _run_metrics(self._snapshot)
        yield from _present_requests(self._snapshot)
        yield from _counted_requests(self._snapshot)
        yield from _latencies(self._snapshot)
        yield from _rank_metrics(self._snapshot.run.ranks)


# --- the run ------------------------------------------------------------------------------------


def _run_metrics(snapshot: Snapshot) -> Iterator[Metric]:
    run = snapshot.run
    yield InfoMetricFamily(
        "k2_run",
        "The run: version of k2, served model, strategy, transport between ranks, nodes and ranks.",
        value=_run_info(run, snapshot.model),
    )
    yield _gauge(
        "k2_run_ready", "1 if the run takes requests, 0 while it starts, restarts or stops.",
        run.state == "ready",
    )  # fmt: skip
    yield _gauge(
        "k2_run_start_time_seconds", "Start of the run's API, in seconds since the epoch.",
        snapshot.activity.began,
    )  # fmt: skip
    restarts = CounterMetricFamily(
        "k2_run_restarts", "Starts of the run's ranks after a failure, beside the first start."
    )
    restarts.add_metric([], run.attempt - 1)
    yield restarts


def _run_info(run: RunView, model: str) -> dict[str, str]:
    return {
        "version": run.version,
        "model": model,
        "strategy": run.strategy,
        "transport": run.transport,
        "nodes": ",".join(run.nodes),
        "ranks": str(len(run.ranks)),
    }


# --- requests -----------------------------------------------------------------------------------


def _present_requests(snapshot: Snapshot) -> Iterator[Metric]:
    stages = snapshot.stages
    yield _gauge(
        "k2_requests_waiting", "Requests that wait for the engine now: the length of the queue.",
        stages["queued"],
    )  # fmt: skip
    running = GaugeMetricFamily(
        "k2_requests_running",
        "Requests in progress now, by stage: reading (of the body), prefill, decode.",
        labels=["stage"],
    )
    for stage in ("reading", "prefill", "decode"):
        running.add_metric([stage], stages[stage])
    yield running
    yield _gauge(
        "k2_queue_oldest_age_seconds", "Time that the longest waiting request has waited; 0 if none"
        " waits.", snapshot.oldest_wait_seconds,
    )  # fmt: skip
    yield from _waiting_by_key(snapshot)
    totals = snapshot.activity.totals
    yield _gauge(
        "k2_completion_tokens_per_second", "Tokens generated per second, over the last 5 seconds.",
        totals.completion_rate.per_second(snapshot.now),
    )  # fmt: skip
    yield _gauge(
        "k2_prompt_tokens_per_second",
        "Tokens of prompts computed per second, over the last 5 seconds; without reused ones.",
        totals.prompt_rate.per_second(snapshot.now),
    )  # fmt: skip


def _waiting_by_key(snapshot: Snapshot) -> Iterator[Metric]:
    count = GaugeMetricFamily(
        "k2_key_requests_waiting", "Requests that wait for the engine now, by name of the key.",
        labels=["key"],
    )  # fmt: skip
    age = GaugeMetricFamily(
        "k2_key_queue_oldest_age_seconds",
        "Time that the longest waiting request of a key has waited; 0 if none waits.",
        labels=["key"],
    )
    for key, waiting in snapshot.waiting_by_key().items():
        count.add_metric([key], waiting.count)
        age.add_metric([key], waiting.oldest_seconds)
    yield count
    yield age


def _counted_requests(snapshot: Snapshot) -> Iterator[Metric]:
    by_key = snapshot.activity.totals.by_key
    requests = CounterMetricFamily(
        "k2_requests", "Requests that have ended, by dialect, result and name of the key.",
        labels=["dialect", "result", "key"],
    )  # fmt: skip
    answers = CounterMetricFamily(
        "k2_answers", "Complete answers, by dialect, reason of the end and name of the key.",
        labels=["dialect", "finish_reason", "key"],
    )  # fmt: skip
    for key, totals in by_key.items():
        # From zero on, so that the first failure is a change that a rate shows.
        ends = {(dialect, result): 0 for dialect in GENERATING for result in RESULTS}
        for (dialect, result), count in (ends | totals.requests).items():
            requests.add_metric([dialect, result, key], count)
        reasons = {(dialect, reason): 0 for dialect in GENERATING for reason in FINISH_REASONS}
        for (dialect, reason), count in (reasons | totals.answers).items():
            answers.add_metric([dialect, reason, key], count)
    pauses = CounterMetricFamily(
        "k2_key_pauses",
        "Pauses of running requests, in which others were computed, by name of the key.",
        labels=["key"],
    )
    for key, totals in by_key.items():
        pauses.add_metric([key], totals.pauses)
    yield requests
    yield answers
    yield pauses
    yield from _tokens(by_key)


def _tokens(by_key: dict[str, KeyTotals]) -> Iterator[Metric]:
    named = {
        "prompt": "Tokens of prompts, computed or taken from the prefix cache.",
        "cached": "Tokens of prompts that were taken from the prefix cache.",
        "completion": "Tokens of answers, with those of reasoning and calls.",
        "reasoning": "Tokens of complete answers that were reasoning.",
        "draft": "Tokens of complete answers that were guessed from their context and verified.",
        "accepted": "Guessed tokens that the model generated, too.",
    }
    full_names = {"cached": "k2_prompt_cached_tokens", "accepted": "k2_draft_accepted_tokens"}
    for name, text in named.items():
        full_name = full_names.get(name, f"k2_{name}_tokens")
        family = CounterMetricFamily(full_name, text, labels=["dialect", "key"])
        for key, totals in by_key.items():
            counts = cast("Counter[Dialect]", getattr(totals, f"{name}_tokens"))
            for dialect in GENERATING:
                family.add_metric([dialect, key], counts[dialect])
        yield family


def _latencies(snapshot: Snapshot) -> Iterator[Metric]:
    named = {
        "queue_seconds": (
            "k2_request_queue_seconds",
            "Time that a request waited for the engine, of those that it has started.",
        ),
        "first_token_seconds": (
            "k2_time_to_first_token_seconds",
            "Time from the end of a request's body to the first token of its answer.",
        ),
        "inter_token_seconds": (
            "k2_inter_token_seconds",
            "Time between two tokens of an answer.",
        ),
        "request_seconds": (
            "k2_request_duration_seconds",
            "Time from the end of a request's body to the end of its complete answer.",
        ),
    }
    for attribute, (name, text) in named.items():
        family = HistogramMetricFamily(name, text, labels=["key"])
        for key, totals in snapshot.activity.totals.by_key.items():
            histogram = cast(Histogram, getattr(totals, attribute))
            family.add_metric([key], _buckets(histogram), histogram.sum)
        yield family


def _buckets(histogram: Histogram) -> list[tuple[str, float]]:
    """Return the cumulative counts by upper bound, as Prometheus wants them."""
    buckets, count = [], 0
    for bound, own in zip((*histogram.bounds, float("inf")), histogram.counts, strict=True):
        count += own
        upper: str = floatToGoString(bound)  # type: ignore[no-untyped-call]
        buckets.append((upper, float(count)))
    return buckets


# --- ranks --------------------------------------------------------------------------------------


def _rank_metrics(ranks: Iterable[RankView]) -> Iterator[Metric]:
    gauges = {
        "used_bytes": (
            "k2_rank_memory_used_bytes",
            "Memory that arrays of MLX hold in a rank: weights, caches and activations.",
        ),
        "kept_bytes": (
            "k2_rank_memory_kept_bytes",
            "Memory of freed arrays that MLX keeps in a rank for new ones.",
        ),
        "peak_bytes": (
            "k2_rank_memory_peak_bytes",
            "The most memory that arrays of MLX have held in a rank at once.",
        ),
        "resident_bytes": (
            "k2_rank_memory_resident_bytes",
            "Memory of a rank's process in RAM, as the system counts it.",
        ),
        "planned_bytes": (
            "k2_rank_memory_planned_bytes",
            "Memory that the plan gives a rank: weights, cache, activations and overhead.",
        ),
        "limit_bytes": (
            "k2_rank_memory_limit_bytes",
            "Memory that a rank may use on its machine or GPU.",
        ),
        "progress_seconds": (
            "k2_rank_progress_age_seconds",
            "Time since a rank's last sign of progress; a few seconds while a run serves.",
        ),
    }
    ranks = tuple(ranks)
    for attribute, (name, text) in gauges.items():
        family = GaugeMetricFamily(name, text, labels=["rank", "node"])
        for rank in ranks:
            if (value := getattr(rank, attribute)) is not None:
                family.add_metric([str(rank.rank), rank.node], value)
        yield family
    steps = CounterMetricFamily(
        "k2_rank_steps",
        "Signs of progress of a rank since its start: steps, parts of steps, and idle moments.",
        labels=["rank", "node"],
    )
    for rank in ranks:
        steps.add_metric([str(rank.rank), rank.node], rank.steps)
    yield steps


def _gauge(name: str, text: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(name, text, value=value)
