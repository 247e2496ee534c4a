"""A real browser, headless, and a record of everything that a page did in it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

# Debian has the first two; elsewhere people have the others.
PROGRAMS = ("chromium-headless-shell", "chromium", "google-chrome", "chromium-browser")
WAIT_MILLISECONDS = 20_000

# Nothing is looked up; a name of a machine in the network is this machine.
_NAMES = (
    "--host-resolver-rules=MAP studio.local 127.0.0.1, MAP * ~NOTFOUND, "
    "EXCLUDE 127.0.0.1, EXCLUDE localhost"
)
# Answers with an error, and a header that has no effect on a name without TLS.
_NO_FAULTS = (
    "Failed to load resource:",
    "The Cross-Origin-Opener-Policy header has been ignored",
)

# Set before a page's own scripts run, and no subject of its policy.
_WATCH_POLICY = """
document.addEventListener("securitypolicyviolation", (event) => {
  console.error(`policy: ${event.violatedDirective} ${event.blockedURI} ${event.sample}`);
});
"""


@contextmanager
def headless_browser() -> Iterator[Browser]:
    """Start the Chromium of this machine; skip the test where there is none."""
    program = next(filter(None, map(shutil.which, PROGRAMS)), None)
    if program is None:
        pytest.skip("no Chromium on PATH: apt-get install chromium-headless-shell")
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=program, args=[_NAMES])
        try:
            yield browser
        finally:
            browser.close()


@dataclass
class Visit:
    """A page that was opened, and what it asked for and complained about."""

    page: Page
    url: str
    requested: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def open(self) -> Page:
        self.page.goto(f"{self.url}/")
        return self.page

    def note(self, kind: str, text: str) -> None:
        """Record a message in the browser's console, if it is about a fault of the page."""
        if kind in ("error", "warning") and not text.startswith(_NO_FAULTS):
            self.problems.append(text)

    def foreign(self) -> list[str]:
        """Return the requests to other origins."""
        own = urlsplit(self.url).netloc
        return [each for each in self.requested if urlsplit(each).netloc != own]

    def stored(self) -> Any:
        """Return everything that the page keeps beyond its own memory."""
        script = (
            "() => [document.cookie, localStorage.length, sessionStorage.length, location.href]"
        )
        return self.page.evaluate(script)


@contextmanager
def visit(browser: Browser, url: str, **options: Any) -> Iterator[Visit]:
    """Make a page in a window of its own, for the server at ``url``.

    At the end no request may have gone elsewhere, and nothing may have been refused by the page's
    policy or have failed in its scripts.
    """
    context = browser.new_context(**options)
    context.set_default_timeout(WAIT_MILLISECONDS)
    page = context.new_page()
    page.add_init_script(_WATCH_POLICY)
    made = Visit(page, url)
    page.on("request", lambda request: made.requested.append(request.url))
    page.on("pageerror", lambda error: made.problems.append(str(error)))
    page.on("console", lambda message: made.note(message.type, message.text))
    try:
        yield made
        assert made.foreign() == []
        assert made.problems == []
    finally:
        context.close()
