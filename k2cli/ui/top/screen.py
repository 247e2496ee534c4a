"""The whole screen of the live view, as lines of text: what fits, from a line on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.text import Text

from k2cli.ui.chat.width import cut, text_width
from k2cli.ui.top.look import DIM, Look
from k2cli.ui.top.overview import help_lines, overview_lines, title_lines
from k2cli.ui.top.tables import rank_lines, request_lines

if TYPE_CHECKING:
    from k2cli.ui.top.state import TopState


@dataclass(frozen=True, slots=True)
class Screen:
    """Lines of a screen. ``offset`` is that of its first scrolled line, ``page`` their number."""

    lines: list[Text]
    offset: int
    page: int


def screen_of(
    state: TopState, now: float, width: int, height: int, offset: int, look: Look
) -> Screen:
    """Draw the screen.

    The title and the last line always stay; the rest scrolls.

    Args:
        state: what is known of the run.
        now: by the monotonic clock.
        width, height: the size of the terminal.
        offset: the line of the scrolled part to begin with; a too large one is lowered.
        look: characters of the terminal.
    """
    if width < 1 or height < 1:
        return Screen([], 0, 1)
    title = title_lines(state, now, width)[: max(1, height - 1)]
    body = _body(state, look, width)
    if state.silent_seconds(now) is not None:
        body = [Text(line.plain, DIM) for line in body]
    page = max(1, height - len(title) - 1)
    offset = max(0, min(offset, len(body) - page))
    shown = body[offset : offset + page]
    hidden = offset, max(0, len(body) - offset - page)
    filler = [Text()] * (page - len(shown))
    lines = [*title, *shown, *filler, *help_lines(width, hidden, look)]
    lines = lines[: height - 1] + lines[-1:] if height > 1 else lines[:1]
    return Screen([_fitting(line, width, look) for line in lines], offset, page)


def _fitting(line: Text, width: int, look: Look) -> Text:
    """Cut a line that is too wide, and replace what the terminal's encoding does not have."""
    if text_width(line.plain) > width:
        line = Text(cut(line.plain, width), line.style)
    if not look.unicode and not line.plain.isascii():
        line = line.copy()
        text = "".join(c if c.isascii() else "." if c == "…" else "?" for c in line.plain)
        line.plain = text[:width]  # marks that took no cell take one now
    return line


def _body(state: TopState, look: Look, width: int) -> list[Text]:
    document = state.document
    if document is None:
        return []
    blank = Text()
    return [
        *overview_lines(state, document, look, width),
        blank,
        *rank_lines(document, look, width),
        blank,
        *request_lines(document, look, width),
    ]
