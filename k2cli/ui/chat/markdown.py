"""Styling of streamed Markdown: every character is written once and never redrawn.

The text stays as the model wrote it, including markers; headings, code and emphasis only get a
style. Redrawing the whole answer at each token would take time quadratic in its length, and would
repeat lines that contain wide characters, such as Chinese.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

_FENCE = "```"
_BOLD, _CODE = "1", "36"


@dataclass(slots=True)
class MarkdownStyler:
    """Filter that adds terminal styles to a stream of text.

    Characters that could begin a marker are held back until the next ones arrive; ``finish``
    returns those still held back, and resets the style.
    """

    _waiting: str = ""
    _shown_style: str = ""
    _line_start: bool = True
    _block: bool = False
    _fence_line: bool = False
    _heading: bool = False
    _inline_code: bool = False
    _bold: bool = False

    def push(self, text: str) -> str:
        """Add text; return the styled text that can be written now."""
        self._waiting += text
        return "".join(self._styled(final=False))

    def finish(self) -> str:
        """Return the held-back text and a reset of the style."""
        rest = "".join(self._styled(final=True))
        return rest + ("\x1b[0m" if self._shown_style else "")

    def _styled(self, *, final: bool) -> Iterator[str]:
        text, self._waiting = self._waiting, ""
        position = 0
        while position < len(text):
            marker = _marker(text, position, final=final)
            if marker is None:
                self._waiting = text[position:]
                return
            yield self._in_style(marker)
            position += len(marker)

    def _in_style(self, marker: str) -> str:
        before = self._style()
        self._apply(marker)
        # Opening and closing markers both have the style of the text that they enclose.
        style = max(before, self._style(), key=len) if marker in ("**", "`") else self._style()
        if style == self._shown_style:
            return marker
        change = ("\x1b[0m" if self._shown_style else "") + (f"\x1b[{style}m" if style else "")
        self._shown_style = style
        return change + marker

    def _apply(self, marker: str) -> None:
        """Update the parser state for a marker or character."""
        at_start, self._line_start = self._line_start, self._line_start and marker == " "
        match marker:
            case "\n":
                self._line_start = True
                self._heading = self._bold = self._inline_code = self._fence_line = False
            case "```" if at_start:
                self._block = not self._block
                self._fence_line = True
            case "#" if at_start and not self._block:
                self._heading = True
            case "`" if not self._block:
                self._inline_code = not self._inline_code
            case "**" if not self._block and not self._inline_code:
                self._bold = not self._bold

    def _style(self) -> str:
        codes = [_BOLD] if self._heading or self._bold else []
        codes += [_CODE] if self._block or self._fence_line or self._inline_code else []
        return ";".join(codes)


def _marker(text: str, position: int, *, final: bool) -> str | None:
    """Return the next marker or single character, or None if more text is needed to decide."""
    rest = text[position : position + len(_FENCE)]
    for marker in (_FENCE, "**"):
        if rest.startswith(marker):
            return marker
        if not final and len(rest) < len(marker) and marker.startswith(rest):
            return None
    return rest[0]
