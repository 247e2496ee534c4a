"""The web page in a real browser. The server is real; its engine and its run are scripted.

Every visit also fails if the page asks another origin, breaks its own policy or has an error.
tests/commands/test_monitoring.py opens the page of a real run.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from k2cli.access.key_ring import KeyRing
from k2cli.protocol import PromptProgress, RequestFailed, Tokens
from k2cli.server.metrics.run_view import RankView, RunView
from k2cli.units import GB
from tests.server.requests import SERVED, encode, prompt_of
from tests.server.scripted import Hang, ScriptedEngine, serving
from tests.server.test_keys import Named
from tests.server.watched import watched
from tests.support.browser import headless_browser, visit
from tests.support.certificates import issue

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

WIDE, NARROW = {"width": 1600, "height": 1000}, {"width": 360, "height": 740}
KEY = "schlüssel-of-the-run"
ROOMY = replace(SERVED, context_length=2_000_000, max_body_bytes=2**20)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with headless_browser() as browser:
        yield browser


class Run:
    """A run of two ranks whose second one is above its plan."""

    def __init__(self, node: str = "studio", **changes: Any) -> None:
        self.node = node
        self.changes = changes

    def view(self) -> RunView:
        memory = {"planned_bytes": 10 * GB, "planned_weights_bytes": 6 * GB, "limit_bytes": 16 * GB,
                  "planned_cache_bytes": 4 * GB}  # fmt: skip
        ranks = tuple(
            RankView(rank, f"{self.node}-{rank}", "metal", layers=(rank, rank + 2), phase="busy",
                     used_bytes=used, peak_bytes=used, kept_bytes=GB, **memory)
            for rank, used in enumerate((8 * GB, 12 * GB))
        )  # fmt: skip
        return replace(RunView("run-1", "ready", ranks=ranks, transport="ring"), **self.changes)


def ask(page: Page, text: str = "Capital of France?") -> None:
    """Send a message with the keyboard."""
    page.locator("#prompt").fill(text)
    page.locator("#prompt").press("Enter")


def answered(page: Page) -> Any:
    """Wait for the end of the last answer; return its element."""
    last = page.locator(".turn.model").last
    page.locator(".turn.model:last-child:not(.working)").wait_for()
    return last


def contrasts(page: Page) -> dict[str, float]:
    """Return the contrast of the visible texts of the page, by element."""
    return page.evaluate(
        """() => {
        const linear = (value) =>
          value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4;
        const part = (value) => linear(value / 255);
        const light = ([r, g, b]) => 0.2126 * part(r) + 0.7152 * part(g) + 0.0722 * part(b);
        const colour = (text) => text.match(/[\\d.]+/g).map(Number);
        const behind = (element) => {
          for (let each = element; each; each = each.parentElement) {
            const found = colour(getComputedStyle(each).backgroundColor);
            if (found.length < 4 || found[3] > 0) return found;
          }
        };
        const result = {};
        for (const each of document.querySelectorAll("#app *")) {
          const own = [...each.childNodes].some((node) => node.nodeType === 3 && node.data.trim());
          if (!own || !each.checkVisibility() || each.disabled) continue;
          const [front, back] = [light(colour(getComputedStyle(each).color)), light(behind(each))];
          const ratio = (Math.max(front, back) + 0.05) / (Math.min(front, back) + 0.05);
          result[`${each.tagName}.${each.className} ${each.textContent.slice(0, 20)}`] = ratio;
        }
        return result;
      }"""
    )


def overflow(page: Page) -> int:
    """Return by how many pixels the page is wider than its window."""
    return page.evaluate("() => document.documentElement.scrollWidth - innerWidth")


# --- the chat -----------------------------------------------------------------------------------


def test_answers_and_their_forms(browser: Browser) -> None:
    with watched(ROOMY, Run()) as server, visit(browser, server.url, viewport=WIDE) as seen:
        server.engine.answer(
            "<think>Two lines.\nOf thought.</think>An **important** `word`:\n```python\nif a < b:\n"
            "    **c**\n```\n| a | b |\n|---|---|\n| 1 | 2 |\n- item\n# Title\n~~~\nopen", size=1
        )  # fmt: skip
        page = seen.open()
        ask(page)
        turn = answered(page)
        assert turn.locator("strong").all_inner_texts() == ["important"]
        assert turn.locator(".block > code").all_inner_texts() == ["word"]
        assert turn.locator("pre").all_inner_texts() == ["if a < b:\n    **c**\n", "open\n"]
        assert turn.locator("td").all_inner_texts() == ["1", "2"]
        assert turn.locator(".heading").text_content() == "Title\n"
        assert turn.locator(".item").text_content() == "• item\n"
        assert not turn.locator(".thoughts").is_visible()
        assert turn.locator(".thoughts").text_content() == "Two lines.\nOf thought.\n"
        assert "of reasoning" in turn.locator(".answer-line").inner_text()
        # The conversation is sent whole, and forgotten with a button.
        server.engine.answer("Second.")
        ask(page, "And then?")
        answered(page)
        sent = prompt_of(server.engine)
        assert sent.startswith("<user>Capital of France?<assistant>An **important**")
        assert "<user>And then?" in sent
        page.get_by_role("button", name="New conversation").click()
        server.engine.answer("Third.", reason="length")
        ask(page, "Anew?")
        assert "cut off" in answered(page).inner_text()
        assert prompt_of(server.engine) == "<user>Anew?<assistant>"


def test_stop_ends_the_request_and_keeps_what_has_come(browser: Browser) -> None:
    with watched(ROOMY) as server, visit(browser, server.url, viewport=NARROW) as seen:
        progress = PromptProgress("", 3, 5)
        server.engine.enqueue([progress, 0.2, Tokens("", encode("Par")), Hang()])
        page = seen.open()
        page.get_by_role("button", name="Chat").click()
        ask(page)
        page.get_by_text("Reading the prompt, 3 of 5 tokens").wait_for()
        page.get_by_text("Par", exact=True).wait_for()
        page.get_by_role("button", name="Stop").click()
        assert "Stopped." in answered(page).inner_text()
        assert server.engine.cancellation.wait(10)
        server.engine.answer("is")
        ask(page, "Go on")
        answered(page)
        assert "<assistant>Par<user>Go on" in prompt_of(server.engine)


HOSTILE = (
    "<img src=x onerror=alert(1)><script>alert(2)</script>",
    "</div></body><iframe src=//evil.example>",
    "\x1b[2J\x1b]52;c;aGk=\x07\x9b31m\x00",
    "\u202eevil\u2066\u2067\u200f",
    "[x](javascript:alert(3))",
    "e" + "\u0301" * 500,
    "```<b>\n</code></pre><b>bold</b>\n```",
    "{{constructor}} ${alert(4)}",
)


@pytest.mark.parametrize("viewport", [NARROW, WIDE], ids=["narrow", "wide"])
def test_hostile_text_is_text(browser: Browser, viewport: dict[str, int]) -> None:
    name = "<b>" + "".join(HOSTILE[:4]) + "n" * 100_000
    run = Run(
        name, run_id=name, state="restarting", cause=name, transport=name, interfaces=(name,) * 9
    )
    served = replace(ROOMY, name=name)
    with watched(served, run) as server, visit(browser, server.url, viewport=viewport) as seen:
        server.activity.begin("chat", name).key = name
        server.engine.answer("\n\n".join((*HOSTILE, "x" * 100_000, "y\n" * 5_000)), size=500)
        page = seen.open()
        page.on("dialog", lambda dialog: seen.problems.append(dialog.message))
        page.locator(".rank").first.wait_for()
        page.get_by_text("The run failed and is starting again.").wait_for()
        assert overflow(page) <= 0
        if viewport is NARROW:
            page.get_by_role("button", name="Chat").click()
        ask(page, "<b>" + "q" * 100_000)
        turn = answered(page)
        assert page.locator("img[src=x], script:not([src]), iframe, b").count() == 0
        text = turn.text_content()
        for written in (
            "<img src=x onerror=alert(1)>",
            "[x](javascript:alert(3))",
            "</code></pre><b>bold",
        ):
            assert written in text
        everything = page.locator("body").text_content() or ""
        assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", everything)
        assert "\ufffd[2J" in text
        # Whatever its form, a text is divided into parts of which the browser lays out few.
        sizes = page.evaluate(
            """() => {
            const blocks = document.querySelectorAll(".model .block");
            return [...blocks].map((each) => each.textContent.length);
            }"""
        )
        assert sum(sizes) > 100_000
        assert max(sizes) <= 4200
        assert overflow(page) <= 0
        for part in page.locator("h1, .node, .pill, .banner, dd").all():
            assert len(part.text_content() or "") < 5000
        page.get_by_role("button", name="New conversation").click()  # it still listens


# --- failures -----------------------------------------------------------------------------------


def test_failures_are_said_in_words(browser: Browser) -> None:
    alice = Named("alice", tokens_per_minute=10)
    keys = KeyRing(KEY, [alice.key])
    engine = ScriptedEngine()
    served = replace(ROOMY, api_key=KEY, name="secret-model")
    with serving(engine, served, keys=keys) as url, visit(browser, url, viewport=WIDE) as seen:
        page = seen.open()
        page.locator("#key").fill(alice.secret)
        page.locator("#key").press("Enter")
        # Her key may not see the run, and chats.
        page.get_by_text("This key may chat, but not read the status of the run").wait_for()
        widths = page.evaluate("['run', 'chat'].map(id => document.getElementById(id).offsetWidth)")
        assert widths[1] > 2 * widths[0]  # where nothing is shown of the run, the chat has the room
        assert page.locator("#model").inner_text() == "secret-model"
        assert not page.locator("#status").is_visible()
        engine.answer("x" * 30)
        ask(page)
        answered(page)
        ask(page)
        page.get_by_text("The run has too much to do, or the key is at its limit").wait_for()
        again = page.get_by_role("button", name=re.compile("Ask again in .* s"))
        assert again.is_disabled()
        page.get_by_role("button", name="Forget the key").click()
        page.locator("#key").fill(KEY)
        page.locator("#key").press("Enter")
        engine.enqueue([RequestFailed("", "a rank was lost", kind="internal")])
        ask(page)
        page.get_by_text("The run failed (HTTP 500): a rank was lost").wait_for()
        engine.answer("Paris", size=1)
        page.get_by_role("button", name="Ask again").click()
        page.get_by_text("Paris", exact=True).wait_for()
        assert page.get_by_text("a rank was lost").count() == 0
        engine.state, engine.cause = "failed", "rank 1 failed"
        ask(page)
        page.get_by_text("No run is ready: rank 1 failed").wait_for()
        page.get_by_text(
            "The run is stopping, and takes no more requests. rank 1 failed"
        ).wait_for()
        keys.replace([])
        engine.state = "ready"


def test_a_connection_that_is_lost_and_comes_back(browser: Browser) -> None:
    engine = ScriptedEngine()
    with visit(browser, "", viewport=WIDE) as seen:
        with serving(engine, ROOMY) as url:
            seen.url = url
            engine.enqueue([PromptProgress("", 5, 5), Tokens("", encode("Par")), Hang()])
            page = seen.open()
            ask(page)
            page.get_by_text("Par", exact=True).wait_for()
        page.get_by_text("The connection was lost before the answer was complete.").or_(
            page.get_by_text("The connection was closed before the answer was complete.")
        ).or_(page.get_by_text("The answer broke off")).first.wait_for()
        page.get_by_text("The run does not answer.").wait_for()
        assert page.locator("#state").inner_text() == "No answer"
        with serving(engine, ROOMY, port=int(url.rpartition(":")[2])):
            page.get_by_text("Ready", exact=True).wait_for()
            assert not page.locator("#banner").is_visible()


def test_a_key_that_is_revoked_is_asked_for_again(browser: Browser) -> None:
    watcher = Named("watcher", monitors=True)
    keys = KeyRing(KEY, [watcher.key])
    served = replace(ROOMY, api_key=KEY)
    with (
        serving(ScriptedEngine(), served, keys=keys) as url,
        visit(browser, url, viewport=WIDE) as seen,
    ):
        page = seen.open()
        page.locator("#key").fill(watcher.secret)
        page.locator("#key").press("Enter")
        page.get_by_text("Ready", exact=True).wait_for()
        keys.replace([])
        page.get_by_text("Wrong API key").wait_for()
        assert not page.locator("#app").is_visible()


# --- looks and places ---------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_and_can_be_read_in_light_and_dark(browser: Browser, scheme: Any) -> None:
    with watched(ROOMY, Run()) as server:
        with visit(browser, server.url, viewport=WIDE, color_scheme=scheme) as seen:
            server.engine.answer("<think>a</think>b `c`")
            server.engine.enqueue([RequestFailed("", "lost", kind="internal")])
            page = seen.open()
            ask(page)
            answered(page)
            ask(page)
            answered(page)
            background = page.evaluate("() => getComputedStyle(document.body).backgroundColor")
            assert (background == "rgb(18, 21, 20)") == (scheme == "dark")
            found = contrasts(page)
            assert len(found) > 40
            assert {each: ratio for each, ratio in found.items() if ratio < 4.5} == {}
            assert page.locator("#run").is_visible()
            assert page.locator("#chat").is_visible()
            assert "over the plan of 10.0 GB" in page.locator(".rank.over").inner_text()
            assert page.locator(".rank.over").count() == 1
            assert overflow(page) <= 0
        options: Any = {"viewport": NARROW, "color_scheme": scheme, "reduced_motion": "reduce"}
        with visit(browser, server.url, **options) as seen:
            page = seen.open()
            page.locator(".rank").first.wait_for()
            assert not page.locator("#chat").is_visible()
            page.get_by_role("button", name="Chat").press("Enter")
            assert page.locator("#prompt").is_visible()
            assert not page.locator("#run").is_visible()
            assert overflow(page) <= 0
            server.engine.enqueue([Hang()])
            ask(page)
            page.locator(".working").wait_for()
            assert page.evaluate("() => document.getAnimations().length") == 0
            page.keyboard.press("Escape")
            answered(page)


def test_it_works_under_tls_and_by_another_name(browser: Browser, tmp_path: Path) -> None:
    files = issue(tmp_path, "studio.local")
    tls = {"ssl_certfile": str(files.certificate), "ssl_keyfile": str(files.key)}
    served = replace(ROOMY, allowed_hosts=frozenset({"studio.local"}))
    for scheme, options in (("https", tls), ("http", {})):
        engine = ScriptedEngine()
        with serving(engine, served, **options) as url:
            port = url.rpartition(":")[2]
            place = f"{scheme}://studio.local:{port}"
            with visit(browser, place, ignore_https_errors=True, viewport=WIDE) as seen:
                page = seen.open()
                engine.answer("Paris")
                ask(page)
                assert "Paris" in answered(page).inner_text()


def test_a_page_of_another_origin_can_neither_frame_nor_use_it(browser: Browser) -> None:
    engine = ScriptedEngine()
    with serving(engine, ROOMY) as url, serving(ScriptedEngine(), ROOMY) as other:
        context = browser.new_context()
        try:
            page = context.new_page()
            page.goto(f"{other}/health")
            script = """async (url) => {
              const frame = document.body.appendChild(document.createElement("iframe"));
              frame.src = `${url}/`;
              const ask = (path, options) =>
                fetch(url + path, options).then((answer) => answer.status, () => "refused");
              const body = JSON.stringify({messages: [{role: "user", content: "x"}]});
              const headers = {"Content-Type": "application/json"};
              return [await ask("/v1/status"), await ask("/"),
                      await ask("/v1/chat/completions", {method: "POST", headers, body}),
                      await ask("/v1/chat/completions", {method: "POST", mode: "no-cors", body})];
            }"""
            assert page.evaluate(script, url)[:3] == ["refused"] * 3
            until = time.monotonic() + 10
            while len(page.frames) < 2 or page.frames[1].url == "":
                assert time.monotonic() < until
                page.wait_for_timeout(20)
            page.wait_for_timeout(200)
            assert page.frames[1].locator("#app").count() == 0
            assert engine.submitted == []
            page.set_content(f'<a href="{url}/">k2</a>')
            page.get_by_text("k2").click()
            page.locator("#prompt").wait_for()  # a link to it works
        finally:
            context.close()
