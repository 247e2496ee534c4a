"""``GET /metrics``, parsed by prometheus_client, against the requests that were sent."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as openmetrics

from k2cli.protocol import Paused, PromptProgress, RequestFailed, Tokens
from k2cli.server.metrics.exposition import RunCollector
from k2cli.server.metrics.run_view import RankView, RunView
from k2cli.server.metrics.snapshot import Snapshot
from k2cli.server.metrics.totals import MAX_KEYS, OTHER_KEYS, Histogram, Rate, Totals
from tests.server.requests import CHAT, QUESTION, SERVED, encode, events_of, post
from tests.server.scripted import Hang, finished
from tests.server.watched import WatchedServer, samples_of, total, watched

GUIDE = Path(__file__).resolve().parents[2] / "docs" / "guide" / "monitoring.md"
RANKS = tuple(
    RankView(
        number, f"n{number}", "cpu", "", (number, number + 1), "idle", 7 + number, 0.5, 30, 35, 40,
        50, 100 + number, 200,
    )
    for number in range(2)
)  # fmt: skip


class FixedRun:
    """A run of two ranks that does not change."""

    def __init__(self, **changes: Any) -> None:
        self.run = RunView("demo-1", "ready", attempt=3, strategy="pipeline", transport="ring",
                           ranks=RANKS, **changes)  # fmt: skip

    def view(self) -> RunView:
        return self.run


@pytest.fixture
def server() -> Iterator[WatchedServer]:
    with watched(run=FixedRun()) as server:
        yield server


def test_counters_are_the_sums_of_what_was_answered(server: WatchedServer) -> None:
    engine, url = server.engine, server.url
    assert set(server.samples()["k2_requests_total"].values()) == {0.0}
    usages = []
    for body in ({}, {"stream": True, "stream_options": {"include_usage": True}}):
        engine.answer("<think>so</think>Paris.")
        body = {"messages": QUESTION} | body
        if "stream" in body:
            usages.append(next(e for e in events_of(url, body) if e.get("usage"))["usage"])
        else:
            usages.append(post(url, body).json()["usage"])
    # A stop string ends this answer before the engine does.
    engine.enqueue([PromptProgress("", 5, 5, 3), Tokens("", encode("one STOP two")), Hang()])
    usages.append(post(url, {"messages": QUESTION, "stop": "STOP"}).json()["usage"])
    engine.answer("ab", size=1)
    completion = post(url, {"prompt": "x"}, "/v1/completions").json()["usage"]
    engine.answer("abc")
    message = post(url, {"messages": QUESTION, "max_tokens": 9}, "/v1/messages").json()["usage"]
    engine.answer("abcd")
    response = post(url, {"input": "x"}, "/v1/responses").json()["usage"]

    found = server.samples()
    assert total(found, "k2_prompt_tokens_total", dialect="chat") == sum(
        usage["prompt_tokens"] for usage in usages
    )
    assert total(found, "k2_completion_tokens_total", dialect="chat") == sum(
        usage["completion_tokens"] for usage in usages
    )
    assert total(found, "k2_reasoning_tokens_total", dialect="chat") == sum(
        usage["completion_tokens_details"]["reasoning_tokens"] for usage in usages
    )
    assert total(found, "k2_prompt_cached_tokens_total", dialect="chat") == 1 + 1 + 3
    names = ("prompt", "completion")
    tokens = [
        [total(found, f"k2_{name}_tokens_total", dialect=dialect) for name in names]
        for dialect in ("completions", "messages", "responses")
    ]
    assert tokens == [
        [completion["prompt_tokens"], completion["completion_tokens"]],
        [message["input_tokens"] + message["cache_read_input_tokens"], message["output_tokens"]],
        [response["input_tokens"], response["output_tokens"]],
    ]
    assert total(found, "k2_requests_total", result="completed") == 6
    assert total(found, "k2_requests_total") == 6
    assert total(found, "k2_answers_total", finish_reason="stop") == 6
    for name in ("k2_request_queue", "k2_time_to_first_token", "k2_request_duration"):
        assert total(found, f"{name}_seconds_count") == 6
        assert total(found, f"{name}_seconds_bucket", le="+Inf") == 6
    # Each of 3 tokens at once, and the single ones: all but the first message's have a gap.
    generated = sum(len(text) for text in ("<think>so</think>Paris.",) * 2) + 2 + 3 + 4
    first = 3 + 3 + 1 + 3 + 3
    assert total(found, "k2_inter_token_seconds_count") == generated - first
    assert total(found, "k2_requests_running") == total(found, "k2_requests_waiting") == 0


def test_drafts_are_counted(server: WatchedServer) -> None:
    engine, url = server.engine, server.url
    for drafts, accepted in ((14, 9), (3, 0)):
        end = finished(20, draft_tokens=drafts, accepted_tokens=accepted)
        engine.enqueue([PromptProgress("", 5, 5), Tokens("", encode("ab")), end])
        usage = post(url, {"messages": QUESTION, "k2": {"speculation": True}}).json()["usage"]
        details = usage["completion_tokens_details"]
        assert details["accepted_prediction_tokens"] == accepted
        assert details["rejected_prediction_tokens"] == drafts - accepted
    found = server.samples()
    assert total(found, "k2_draft_tokens_total", dialect="chat") == 17
    assert total(found, "k2_draft_accepted_tokens_total", dialect="chat") == 9
    totals = server.status()["totals"]
    assert (totals["draft_tokens"], totals["accepted_draft_tokens"]) == (17, 9)
    assert [request.use_speculation for request in engine.submitted] == [True, True]


def test_every_end_of_a_request_is_told_apart(server: WatchedServer) -> None:
    engine, url = server.engine, server.url
    assert post(url, {"messages": 3}).status_code == 400
    assert httpx.get(f"{url}{CHAT}").status_code == 405
    assert post(url, {}, "/v1/nothing").status_code == 404
    engine.enqueue([RequestFailed("", "the queue is full", "capacity")])
    assert post(url, {"messages": QUESTION}).status_code == 429
    engine.enqueue([Tokens("", encode("a")), RequestFailed("", "broken")])
    assert "broken" in str(events_of(url, {"messages": QUESTION})[-1])
    engine.enqueue([Tokens("", encode("a")), ValueError("a bug")])
    assert post(url, {"messages": QUESTION}).status_code == 500
    engine.enqueue([PromptProgress("", 5, 5), Tokens("", encode("a")), Hang()])
    with httpx.stream("POST", f"{url}{CHAT}", json={"messages": QUESTION, "stream": True}) as got:
        next(got.iter_raw())
    engine.state, engine.cause = "failed", "rank 1 failed"
    assert post(url, {"messages": QUESTION}).status_code == 503
    server.wait(lambda: len(server.lines) == 8)
    found = server.samples()["k2_requests_total"]
    ended = {
        (labels["dialect"], labels["result"]): count
        for key, count in found.items()
        if count and (labels := dict(key))
    }
    assert ended == {
        ("chat", "invalid"): 1,
        ("chat", "refused"): 2,
        ("chat", "failed"): 2,
        ("chat", "client_gone"): 1,
        ("other", "invalid"): 2,
    }
    # The tokens of answers that were broken off were generated, too.
    assert total(server.samples(), "k2_completion_tokens_total") == 3


def test_labels_have_nothing_of_a_client(server: WatchedServer) -> None:
    before = {(name, key) for name, found in server.samples().items() for key in found}
    for number in range(30):
        server.engine.answer("a")
        headers = {"User-Agent": f"canary{number}", "X-Request-Id": f"canary{number}"}
        post(server.url, {"messages": QUESTION, "user": f"canary{number}"}, **headers)
        post(server.url, {"messages": QUESTION, "model": f"canary{number}"}, **headers)
        post(server.url, {}, f"/v1/canary{number}")
    after = {(name, key) for name, found in server.samples().items() for key in found}
    assert {dict(key)["dialect"] for _, key in after - before} == {"other"}
    assert "canary" not in server.get("/metrics").text

    totals = Totals()
    for number in range(3 * MAX_KEYS):
        totals.of_key(f"key{number}").requests["chat", "completed"] += 1
    assert len(totals.by_key) == MAX_KEYS + 1
    assert totals.by_key[OTHER_KEYS].requests["chat", "completed"] > MAX_KEYS


def test_the_run_and_its_ranks(server: WatchedServer) -> None:
    found = server.samples()
    (info,) = found["k2_run_info"]
    assert dict(info) | {"version": ""} == {
        "version": "", "model": "toy", "strategy": "pipeline", "transport": "ring",
        "nodes": "n0,n1", "ranks": "2",
    }  # fmt: skip
    assert found["k2_run_restarts_total"] == {frozenset(): 2.0}
    assert found["k2_run_ready"] == {frozenset(): 1.0}
    values = {"used": 30, "kept": 35, "peak": 40, "resident": 50, "limit": 200}
    for name, value in values.items():
        assert total(found, f"k2_rank_memory_{name}_bytes", rank="1", node="n1") == value
    assert total(found, "k2_rank_memory_planned_bytes") == 100 + 101
    assert total(found, "k2_rank_steps_total", rank="1") == 8


@pytest.mark.parametrize("accept", ["", "*/*", "text/plain;version=0.0.4", "text/plain;version=x",
                                    "text/html,", ";;=,=;version="])  # fmt: skip
def test_the_plain_format_is_the_default(server: WatchedServer, accept: str) -> None:
    got = server.get("/metrics", Accept=accept)
    assert got.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    assert samples_of(got.text)["k2_run_ready"]


def test_openmetrics_is_sent_if_asked_for(server: WatchedServer) -> None:
    accept = "application/openmetrics-text;version=1.0.0;q=0.6,text/plain;version=0.0.4;q=0.3"
    for asked in (accept, "application/openmetrics-text;version=evil;escaping=no"):
        got = server.get("/metrics", Accept=asked)
        kind = "application/openmetrics-text; version=1.0.0; charset=utf-8"
        assert got.headers["content-type"] == kind
        families = {family.name: family for family in openmetrics(got.text)}
        assert families["k2_run"].type == "info"
        assert families["k2_requests"].type == "counter"


@pytest.mark.parametrize("path", ["/metrics", "/v1/status"])
def test_a_run_with_a_key_shows_nothing_without_it(path: str) -> None:
    with watched(replace(SERVED, api_key="secret-key")) as server:
        assert server.get(path).status_code == 401
        assert server.get(path, Authorization="Bearer wrong").status_code == 401
        assert server.get(path, Authorization="Bearer secret-key").status_code == 200
        found = server.samples(Authorization="Bearer secret-key")
        assert total(found, "k2_requests_total", dialect="other", result="unauthorized") == 2


def test_the_guide_describes_every_metric() -> None:
    with watched(run=FixedRun()) as server:
        snapshot = Snapshot(FixedRun().view(), "toy", server.activity)
        made = {
            f"{family.name}{_SUFFIXES.get(family.type, '')}": family
            for family in RunCollector(snapshot).collect()
        }
    rows = re.findall(r"^\| `(k2_\w+)` \| (\w+) \| ([^|]*) \| (.*) \|$", GUIDE.read_text(), re.M)
    described = {name: (kind, labels, text) for name, kind, labels, text in rows}
    assert described == {
        name: (
            family.type,
            ", ".join(
                f"`{label}`"
                for label in dict.fromkeys(
                    label for sample in family.samples for label in sample.labels if label != "le"
                )
            ),
            family.documentation,
        )
        for name, family in made.items()
    }


_SUFFIXES = {"counter": "_total", "info": "_info"}


def test_histograms_and_rates() -> None:
    histogram = Histogram((1.0, 2.0))
    for value in (0.5, 1.0, 1.5, 99.0):
        histogram.observe(value, times=2)
    assert (histogram.counts, histogram.sum, histogram.count) == ([4, 2, 2], 204.0, 8)
    rate = Rate()
    assert rate.per_second(10.0) == 0.0
    for second in range(100):
        rate.add(30, second + 0.5)
    assert rate.per_second(100.0) == 30.0
    assert len(rate._counts) <= 7
    assert rate.per_second(200.0) == 0.0


def test_what_waits_and_what_was_paused_is_shown_by_key(server: WatchedServer) -> None:
    for number, key in enumerate(("alice", "alice", "bob")):
        record = server.activity.begin("chat", f"id{number}")
        record.key = key
        record.note_submitted(f"e{number}", 5)
        record.queued_at = record.began - 10 * (number + 1)
    record.note_event(PromptProgress("e2", 1, 5))
    record.note_event(Paused("e2"))
    assert record.stage == "prefill"
    found = samples_of(server.get("/metrics").text)
    waiting = {key: total(found, "k2_key_requests_waiting", key=key) for key in ("alice", "bob")}
    assert waiting == {"alice": 2, "bob": 0}
    assert total(found, "k2_requests_waiting") == 2
    assert 20 <= total(found, "k2_key_queue_oldest_age_seconds", key="alice") < 30
    assert total(found, "k2_key_queue_oldest_age_seconds", key="bob") == 0
    assert total(found, "k2_key_pauses_total", key="bob") == 1
    server.activity.live.clear()
