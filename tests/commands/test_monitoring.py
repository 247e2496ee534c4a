"""Metrics, status, access log and web page of a real run of two ranks, under load."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from k2cli.units import format_bytes
from tests.support.browser import Visit, headless_browser, visit
from tests.support.harness import wait_until
from tests.support.terminal import Terminal
from tests.support.thinking_model import thinking_model

pytestmark = [pytest.mark.ranks, pytest.mark.slow, pytest.mark.shared_state]
CANARY = "canary of a prompt"
KEY = "k2-the-key-of-this-run"
PROMPT_TOKENS = 300
ANSWER_TOKENS = 150


def k2(*arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "k2cli", *arguments],
        capture_output=True, text=True, timeout=120, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def run(toy_k2: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """A run, as its launch has printed it."""
    # The template of K2.5 opens the reasoning, so that whatever the toy writes in a chat is that.
    model = thinking_model(toy_k2, tmp_path_factory.mktemp("monitoring") / "toy-thinking", "k2.5")
    started = json.loads(
        k2("launch", str(model), "--nodes", "localhost,localhost", "--backend", "ring",
           "--parallel", "pipeline", "--context", "512", "--concurrency", "2", "--api-key", KEY,
           "--detach", "--json")
    )  # fmt: skip
    try:
        yield started
    finally:
        k2("stop", started["run_id"])


def test_two_ranks_show_their_memory_and_requests(run: dict[str, Any]) -> None:
    url = run["url"]
    with httpx.Client(base_url=url, headers={"Authorization": f"Bearer {KEY}"}) as client:
        _watch(client)
        _watch_on_terminal(client, run["run_id"])
        assert httpx.get(f"{url}/metrics").status_code == 401
        shown = json.loads(k2("ps", "--json"))["status"][run["run_id"]]
        assert shown["totals"]["requests"]["completed"] == 4
        log = k2("logs", run["run_id"])
    lines = [line.partition(" api | ")[2] for line in log.splitlines() if " api | " in line]
    answers = [line for line in lines if line.startswith("completions 200 ")]
    assert len(answers) == 4
    for line in answers[:3]:
        assert f"in={PROMPT_TOKENS} " in line
        assert f"out={ANSWER_TOKENS} " in line
        assert "id=of-the-client " in line
    assert CANARY not in log
    assert KEY not in log


def _watch(client: httpx.Client) -> None:
    """Look at a run while it answers three requests, of which two fit at the same time."""
    begin = client.post("/v1/tokenize", json={"prompt": CANARY}).json()["tokens"]
    prompt = [*begin, *range(300, 300 + PROMPT_TOKENS - len(begin))]
    body: dict[str, Any] = {
        "prompt": prompt, "max_tokens": ANSWER_TOKENS, "k2": {"ignore_stop_tokens": True},
    }  # fmt: skip
    headers = {"X-Request-Id": "of-the-client"}
    usages: list[Any] = []

    def ask() -> None:
        answer = client.post("/v1/completions", json=body, headers=headers, timeout=120)
        usages.append(answer.json()["usage"])

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    during: list[Any] = []

    def all_were_seen() -> bool:
        during.append(client.get("/v1/status").json()["requests"])
        return during[-1]["decode"] == 2 and during[-1]["queued"] == 1

    try:
        wait_until(all_were_seen, 60, "two answers and one that waits")
    finally:
        for thread in threads:
            thread.join(120)
    states = [each["state"] for each in during[-1]["listed"]]
    assert states == ["decode", "decode", "queued"]
    assert during[-1]["listed"][-1]["queue_position"] == 1
    for each in during[-1]["listed"][:2]:
        assert (each["prompt_tokens_done"], each["prompt_tokens"]) == (PROMPT_TOKENS,) * 2
        assert 0 < each["generated_tokens"] < ANSWER_TOKENS

    status = client.get("/v1/status").json()
    _check_ranks(status)
    totals = status["totals"]
    assert totals["prompt_tokens"] == sum(usage["prompt_tokens"] for usage in usages)
    assert totals["completion_tokens"] == sum(usage["completion_tokens"] for usage in usages)
    assert totals["cached_tokens"] == sum(
        usage["prompt_tokens_details"]["cached_tokens"] for usage in usages
    )
    cache = status["kv_cache"]
    assert cache["prefixes"] >= 1
    assert cache["reserved_tokens"] == 0
    assert PROMPT_TOKENS < cache["prefix_tokens"] <= cache["budget_tokens"]
    text = client.get("/metrics").text
    samples = [sample for family in text_string_to_metric_families(text)
               for sample in family.samples]  # fmt: skip
    memory = {sample.labels["rank"]: sample.value for sample in samples
              if sample.name == "k2_rank_memory_peak_bytes"}  # fmt: skip
    assert memory == {str(rank["rank"]): rank["memory"]["peak_bytes"] for rank in status["ranks"]}
    assert CANARY not in text


def _is_shown(terminal: Terminal, pattern: str) -> bool:
    return re.search(pattern, "\n".join(terminal.screen.display)) is not None


def _watch_on_terminal(client: httpx.Client, run_id: str) -> None:
    """Look at a run with ``k2 top`` while it answers a request that begins like earlier ones."""
    begin = client.post("/v1/tokenize", json={"prompt": CANARY}).json()["tokens"]
    prompt = [*begin, *range(300, 300 + PROMPT_TOKENS - len(begin))]
    body = {"prompt": prompt, "max_tokens": ANSWER_TOKENS, "k2": {"ignore_stop_tokens": True}}
    with Terminal("top", "--interval", "0.5", columns=80) as terminal:
        terminal.expect("no requests")
        thread = threading.Thread(target=client.post, args=("/v1/completions",),
                                  kwargs={"json": body, "timeout": 120})  # fmt: skip
        thread.start()

        def shown() -> str:
            return "\n".join(terminal.screen.display)

        terminal.wait(lambda: "1 decode, 0 prefill, 0 queued" in shown(), "no answer is shown")
        row = r"\n- +decode .* 300 +\d+ +[1-9]\d* "
        terminal.wait(partial(_is_shown, terminal, row), "its tokens are not shown")
        terminal.wait(lambda: "4 completed" in shown(), "the end is not shown")
        terminal.wait(lambda: "no requests" in shown(), "the end is not shown")
        thread.join(120)
        status = client.get("/v1/status").json()
        hits, started = status["totals"]["cache_hits"], status["totals"]["queue"]["count"]
        assert hits >= 1
        kept, prefixes = status["kv_cache"]["prefix_tokens"], status["kv_cache"]["prefixes"]
        expected = [
            "toy-thinking  ready  up ",
            f"0 restarts  {run_id}",
            "ring, pipeline, 2 ranks on 1 node",
            f"cache hits  {hits} of {started} requests",
            f"0 reserved by requests, {kept:,} in {prefixes}",
        ]
        patterns = [re.escape(text) for text in expected]
        for rank in status["ranks"]:
            planned = format_bytes(rank["memory"]["planned_bytes"])
            # At 80 columns the name is cut where the figures are wide.
            patterns.append(rf"\n +{rank['rank']}  loca\S+ +\w.*%.* of {planned}")
        for pattern in patterns:  # a screen may be read while it is being drawn
            terminal.wait(partial(_is_shown, terminal, pattern), f"{pattern} is not shown")
        assert KEY not in terminal.raw
        assert CANARY not in terminal.raw
        terminal.type("q")
        assert terminal.close() == 0


def _check_ranks(status: Any) -> None:
    assert (status["state"], status["attempt"]) == ("ready", 1)
    assert (status["link"]["transport"], status["link"]["strategy"]) == ("ring", "pipeline")
    assert [rank["rank"] for rank in status["ranks"]] == [0, 1]
    ranges = sorted(rank["layers"] for rank in status["ranks"])
    assert ranges[0][0] == 0
    assert ranges[0][1] == ranges[1][0]
    for rank in status["ranks"]:
        memory = rank["memory"]
        assert rank["device"] == "cpu"
        assert rank["phase"] in ("idle", "busy", "waiting")
        assert rank["progress_age_seconds"] < 30
        assert rank["loaded_bytes"] == rank["load_bytes"] == memory["weights_bytes"]
        assert memory["weights_bytes"] <= memory["used_bytes"] <= memory["peak_bytes"]
        assert memory["peak_bytes"] + memory["kept_bytes"] <= memory["planned_bytes"]
        assert memory["peak_bytes"] < memory["resident_bytes"]
        parts = ("weights", "kv_cache", "activation", "overhead")
        planned = sum(memory[f"{part}_bytes"] for part in parts)
        assert planned == memory["planned_bytes"] <= memory["limit_bytes"]


def test_the_page_of_a_run_with_the_keyboard_alone(run: dict[str, Any]) -> None:
    size = {"width": 1600, "height": 1000}
    with headless_browser() as browser, visit(browser, run["url"], viewport=size) as seen:
        _enter_the_key(seen)
        _chat(seen)
        assert seen.stored() == ["", 0, 0, f"{seen.url}/"]
        page = seen.page
        page.get_by_role("button", name="Forget the key").press("Enter")
        page.locator("#key").wait_for()
        assert page.locator("#turns").text_content() == ""


def _enter_the_key(seen: Visit) -> None:
    page = seen.open()
    page.locator("#key").wait_for()
    assert "toy-thinking" not in page.content()
    assert [each.partition("/v1/")[2] for each in seen.requested if "/v1/" in each] == ["status"]
    page.keyboard.type("wrong")  # the field has the focus
    page.keyboard.press("Enter")
    page.get_by_text("Wrong API key").wait_for()
    assert page.locator("#key").input_value() == ""
    page.keyboard.type(KEY)
    page.keyboard.press("Enter")
    page.locator(".rank").nth(1).wait_for()
    assert page.locator("#model").inner_text() == "toy-thinking"
    for rank in range(2):
        meter = page.get_by_role("meter", name=f"Memory of rank {rank}")
        said = meter.get_attribute("aria-valuetext") or ""
        assert re.fullmatch(r"[\d.]+ MB used and [\d.]+ .B kept, [\d.]+ .B planned", said), said


def _chat(seen: Visit) -> None:
    page = seen.page
    page.keyboard.type("Say something.")  # the message field has the focus
    page.keyboard.press("Enter")
    page.locator("tr[data-state=decode]").wait_for()
    page.locator(".reasoning summary").wait_for()
    assert page.locator(".thoughts").text_content()
    assert not page.locator(".thoughts").is_visible()
    page.get_by_text(re.compile(r"\d+ tokens · [\d.]+ per second")).wait_for()
    page.keyboard.press("Escape")
    page.locator(".turn.model:not(.working)").wait_for()
    assert "Stopped." in page.locator(".answer-line").inner_text()
    page.get_by_text("No request is in progress.").wait_for()
    page.get_by_text("1 client gone").wait_for()
    page.locator(".reasoning summary").focus()
    page.keyboard.press("Enter")
    assert page.locator(".thoughts").is_visible()
