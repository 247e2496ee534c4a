"""``GET /v1/status``: the requests in progress, and the states of a run."""

from __future__ import annotations

import threading
from typing import Any

import httpx
import pytest
from msgspec.structs import replace

from k2cli.protocol import (
    Assignment,
    Bootstrap,
    KvCacheUse,
    LoadProgress,
    PlannedRank,
    PlannedRun,
    PromptProgress,
    RankReady,
    RankStatus,
    Tokens,
)
from k2cli.server.metrics.run_view import shown_state
from k2cli.server.metrics.run_watch import RunWatch
from k2cli.server.metrics.status import MAX_LISTED
from tests.server.requests import CHAT, encode
from tests.server.scripted import Hang, ScriptedEngine
from tests.server.watched import WatchedServer, watched

SECRET = "canary-of-the-status"


def _in_background(server: WatchedServer, requests: int) -> list[threading.Thread]:
    body = {"messages": [{"role": "user", "content": SECRET}], "stream": True}

    def send() -> None:
        with httpx.Client(verify=False, timeout=30) as client:
            client.post(f"{server.url}{CHAT}", json=body)

    threads = [threading.Thread(target=send) for _ in range(requests)]
    for thread in threads:
        thread.start()
    return threads


def _release(server: WatchedServer, threads: list[threading.Thread]) -> None:
    for request in server.engine.submitted:
        server.engine.cancel(request.request_id)
    for thread in threads:
        thread.join(30)


def test_requests_are_shown_with_their_progress_and_no_contents() -> None:
    with watched() as server:
        script: list[Any] = [PromptProgress("", 40, 100, 30)]
        threads: list[threading.Thread] = []
        for steps in ([*script, Tokens("", encode("abc")), Hang()], [*script, Hang()], [Hang()],
                      [Hang()]):  # fmt: skip
            server.engine.enqueue(steps)
            count = len(server.engine.submitted) + 1
            threads += _in_background(server, 1)
            server.wait(lambda count=count: len(server.engine.submitted) == count)  # type: ignore[misc]
        server.wait(lambda: server.status()["requests"]["decode"] == 1)
        first, second = [request.request_id for request in server.engine.submitted[2:]]
        server.waiting.note_order([second, first])
        try:
            text = server.get("/v1/status").text
            status = server.status()
        finally:
            _release(server, threads)
        requests = status["requests"]
        assert [requests[name] for name in ("reading", "queued", "prefill", "decode")] == [
            0, 2, 1, 1,
        ]  # fmt: skip
        listed = requests["listed"]
        assert [each["state"] for each in listed] == ["decode", "prefill", "queued", "queued"]
        assert [each["queue_position"] for each in listed] == [None, None, 1, 2]
        ages = [each["age_seconds"] for each in listed]
        assert ages[2] < ages[3]  # the order is the engine's, not that of arrival
        shown = [(each["prompt_tokens_done"], each["prompt_tokens"]) for each in listed]
        prompt = len(server.engine.submitted[0].prompt)
        assert shown == [(100, 100), (40, 100), (0, prompt), (0, prompt)]
        assert [each["generated_tokens"] for each in listed] == [3, 0, 0, 0]
        assert listed[0]["cached_tokens"] == 30
        assert SECRET not in text
        ids = {each["id"] for each in listed}
        assert len(ids) == 4
        assert not ids & {request.request_id for request in server.engine.submitted}
        server.wait(lambda: sum(server.status()["totals"]["requests"].values()) == 4)
        assert server.status()["requests"]["listed"] == []
        assert server.status()["totals"]["cache_hits"] == 2


def test_few_requests_are_listed_and_all_are_counted() -> None:
    with watched() as server:
        for number in range(MAX_LISTED + 20):
            server.activity.begin("chat", f"id{number}").note_submitted(f"e{number}", 5)
        requests = server.status()["requests"]
        assert (requests["queued"], len(requests["listed"])) == (MAX_LISTED + 20, MAX_LISTED)


@pytest.mark.parametrize(
    ("state", "attempt", "restarts", "shown"),
    [
        ("starting", 1, False, "starting"),
        ("ready", 2, True, "ready"),
        ("failed", 1, True, "restarting"),
        ("starting", 2, True, "restarting"),
        ("failed", 1, False, "stopping"),
        ("stopping", 1, True, "stopping"),
    ],
)
def test_states(state: Any, attempt: int, restarts: bool, shown: str) -> None:
    engine = ScriptedEngine()
    engine.state = state
    assert shown_state(engine, attempt=attempt, restarts=restarts) == shown


def test_the_reports_of_guards_make_the_view_of_a_run() -> None:
    assignment = Assignment(
        "demo-1", 0, 2, ["a", "b"], "ring", "/m", "pipeline", [(2, 4), (0, 2)], "float16", 64, 1,
        16, [1, 2],
    )  # fmt: skip
    plan = PlannedRun([PlannedRank(90, 100, 50, 20, 15, 5, "metal", ""),
                       PlannedRank(80, 100, device="cuda", gpu="GPU 1")],
                      "because", ["a: en0"])  # fmt: skip
    bootstrap = Bootstrap(assignment, "ab" * 32, "127.0.0.1", 1, "demo", planned=plan)
    engine = ScriptedEngine()
    engine.state, engine.cause = "starting", "/secret/folder/model is loading"
    watch = RunWatch(bootstrap, engine)
    watch.note(LoadProgress(1, "loading", 10, 40))
    watch.note(RankStatus(1, 5, "loading", 33, 22, True, 4, 44))
    watch.note(RankStatus(7, 5, "loading"))
    with watched(run=watch) as server:
        status = server.status()
        assert (status["state"], status["cause"]) == ("starting", "model is loading")
        first, second = status["ranks"]
        assert (first["layers"], first["phase"], first["progress_age_seconds"]) == (
            [2, 4],
            "",
            None,
        )
        assert first["memory"] == {
            "used_bytes": 0, "kept_bytes": 0, "peak_bytes": 0, "resident_bytes": 0,
            "planned_bytes": 90, "limit_bytes": 100, "weights_bytes": 50,
            "kv_cache_bytes": 20, "activation_bytes": 15, "overhead_bytes": 5,
        }  # fmt: skip
        assert (second["node"], second["device"], second["gpu"]) == ("b", "cuda", "GPU 1")
        assert (second["loaded_bytes"], second["load_bytes"]) == (10, 40)
        memory = second["memory"]
        names = ("used", "kept", "peak", "resident")
        assert [memory[f"{name}_bytes"] for name in names] == [22, 4, 44, 33]
        assert status["link"] == {
            "transport": "ring", "strategy": "pipeline", "reason": "because",
            "interfaces": ["a: en0"],
        }  # fmt: skip
        assert status["kv_cache"] is None
        watch.note_cache_use(KvCacheUse(2, 512, 1024, 4096))
        assert server.status()["kv_cache"] == {
            "prefixes": 2, "prefix_tokens": 512, "reserved_tokens": 1024, "budget_tokens": 4096,
        }  # fmt: skip
        watch.note(RankReady(1, 40, 41, 44, 1.0))
        assert server.status()["ranks"][1]["loaded_bytes"] == 40
        watch.begin_attempt(replace(bootstrap, attempt=2))
        again = server.status()
        assert (again["attempt"], again["state"]) == (2, "restarting")
        assert again["ranks"][1]["memory"]["used_bytes"] == 0
        assert again["kv_cache"] is None


def test_a_status_is_answered_while_no_run_is_ready() -> None:
    with watched() as server:
        server.engine.state, server.engine.cause = "failed", "rank 1 failed"
        assert server.get("/health").status_code == 503
        assert server.status()["cause"] == "rank 1 failed"
        found = server.samples()
        assert found["k2_run_ready"] == {frozenset(): 0.0}
