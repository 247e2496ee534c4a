"""The live view in textual, without a terminal: screens are compared as text."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from k2cli.client.status_watch import Observation
from k2cli.ui.top.app import TopApp
from k2cli.ui.top.look import Look
from k2cli.ui.top.state import HISTORY_SAMPLES
from tests.ui.top.statuses import document, request

SCREENS = Path(__file__).parents[2] / "data" / "top"


class Told:
    """Observations that a test makes."""

    interval_seconds = 1.0

    def __init__(self) -> None:
        self.stopped = False
        self.notify: Callable[[Observation], None] = lambda observation: None

    def start(self, notify: Callable[[Observation], None]) -> None:
        self.notify = notify

    def stop(self) -> None:
        self.stopped = True

    def see(self, **changed: object) -> None:
        self.notify(Observation(time.monotonic(), document(**changed)))

    def miss(self, problem: str) -> None:
        self.notify(Observation(time.monotonic(), problem=problem))


def text_of(app: TopApp) -> list[str]:
    """Return the lines as textual has composed them."""
    return [
        "".join(segment.text for segment in strip).rstrip()
        for strip in app.screen._compositor.render_strips()
    ]


@pytest.mark.parametrize("size", [(80, 24), (40, 40), (200, 24)])
async def test_screens(size: tuple[int, int]) -> None:
    watch = Told()
    app = TopApp(watch, "run kimi-k2-1a2b", Look())
    async with app.run_test(size=size) as pilot:
        watch.see()
        await pilot.pause()
        expected = (SCREENS / f"{size[0]}.txt").read_text().splitlines()
        assert text_of(app) == expected + [""] * (size[1] - len(expected) - 1) + ["q leave"]
        assert not any(len(line) > size[0] for line in text_of(app))
    assert watch.stopped


async def test_resizing_scrolling_and_leaving() -> None:
    watch = Told()
    app = TopApp(watch, "run kimi-k2-1a2b", Look())
    async with app.run_test(size=(80, 24)) as pilot:
        watch.see(requests={"decode": 60, "listed": [request("decode")] * 50})
        await pilot.pause()
        first = text_of(app)
        assert first[-1].endswith("↓47")
        await pilot.press("end")
        assert text_of(app)[-2] == "10 more are not listed"
        assert text_of(app)[-1].endswith("↑47")
        await pilot.press("pageup", "up", "home")
        assert text_of(app) == first
        await pilot.press("down", "down", "pagedown")
        assert text_of(app)[0] == first[0]
        for size in ((3, 2), (1, 1), (40, 12), (80, 24)):
            await pilot.resize_terminal(*size)
            await pilot.pause()
            assert len(text_of(app)) == size[1]
        await pilot.press("home")
        assert text_of(app) == first
        await pilot.press("q")
        await pilot.pause()
        assert not app.is_running
    assert watch.stopped


async def test_a_run_that_does_not_answer_is_shown_with_what_is_known() -> None:
    watch = Told()
    app = TopApp(watch, "http://studio.local:8080", Look())
    async with app.run_test(size=(80, 24)) as pilot:
        assert text_of(app)[0] == "k2 top  http://studio.local:8080"
        watch.miss("nothing answers at http://studio.local:8080: \x1b[2Jrefused")
        await pilot.pause()
        assert text_of(app)[1].startswith("waiting for")
        assert text_of(app)[1].endswith("refused")
        watch.see(state="restarting", cause="rank 1 on studio-b was killed by signal 9")
        await pilot.pause()
        assert text_of(app)[1] == "rank 1 on studio-b was killed by signal 9"
        watch.miss("the connection was lost")
        await pilot.pause()
        lines = text_of(app)
        assert lines[1].endswith(": the connection was lost")
        assert "118 completed" in "\n".join(lines)
        # Nothing comes any more, because a question hangs: the seconds go on.
        async with asyncio.timeout(20):
            while text_of(app)[1] == lines[1]:
                await asyncio.sleep(0.05)
        watch.see()
        await pilot.pause()
        assert "no answer" not in "\n".join(text_of(app))


async def test_a_bug_ends_the_view_and_is_handed_on() -> None:
    watch = Told()
    app = TopApp(watch, "run kimi-k2-1a2b", Look())
    bug = ZeroDivisionError("of a test")
    async with app.run_test() as pilot:
        watch.notify(Observation(0.0, bug=bug))
        await pilot.pause()
        assert not app.is_running
    assert app.bug is bug


async def test_nothing_grows() -> None:
    watch = Told()
    app = TopApp(watch, "run kimi-k2-1a2b", Look())
    async with app.run_test(size=(200, 50)) as pilot:
        for _ in range(HISTORY_SAMPLES + 50):
            app.view.state.observe(Observation(time.monotonic(), document()))
        watch.see(ranks=[{"rank": n, "node": "n" * 10_000} for n in range(3000)])
        await pilot.pause()
        assert len(app.view.state.history) == HISTORY_SAMPLES
        await pilot.press("end")
        assert "2936 more are not shown" in "\n".join(app.view.plain)
