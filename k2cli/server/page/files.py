"""The files of the web page, and the headers that keep it harmless.

The files are a fixed list, are read once and all together, and have nothing of a run in them: the
page asks ``/v1/status`` and the other routes, with the key that its user enters. Nothing is built
or loaded from elsewhere, and the browser is told so by a Content-Security-Policy.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

PAGE_FOLDER = "/page/"
"""Beginning of the paths of all files but the page itself, which is at ``/``."""

INDEX = "index.html"

_KINDS = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
_NAMES = (
    INDEX, "page.css", "icon.svg", "main.js", "api.js", "chat.js", "status.js", "ranks.js",
    "requests.js", "text.js", "dom.js",
)  # fmt: skip

# No inline script or style, nothing from other origins, no frames, no forms that are sent, and
# strings never become HTML (trusted types), whatever a model or a status says.
CONTENT_SECURITY_POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "connect-src 'self'",
        "img-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    )
)
_HEADERS = {
    "Content-Security-Policy": CONTENT_SECURITY_POLICY,
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), display-capture=(), geolocation=(), microphone=(), usb=()",
    # Asked for again each time, which costs no transfer: another version may serve here tomorrow.
    "Cache-Control": "no-cache",
}


@dataclass(frozen=True, slots=True)
class PageFile:
    """One file. ``tag`` is its ETag, with the quotes."""

    content: bytes
    kind: str
    tag: str

    @property
    def headers(self) -> dict[str, str]:
        """The headers that the file is sent with, beside its kind."""
        return {**_HEADERS, "ETag": self.tag}

    def is_known_as(self, if_none_match: str) -> bool:
        """Return True if a header ``If-None-Match`` names this content."""
        tags = [tag.strip().removeprefix("W/") for tag in if_none_match.split(",")]
        return self.tag in tags or "*" in tags


@functools.cache
def page_files() -> Mapping[str, PageFile]:
    """Read the files of the page; return them by name."""
    folder = Path(__file__).parent
    return {name: _read(folder / name) for name in _NAMES}


def _read(path: Path) -> PageFile:
    content = path.read_bytes()
    tag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
    return PageFile(content, _KINDS[path.suffix], tag)
