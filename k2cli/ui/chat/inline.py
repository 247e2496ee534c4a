"""Markdown within a line: emphasis, strong emphasis, code and struck-out text, as styled fragments.

The markers of a span are left out, and its text gets a style. That is known only when the span is
closed, so a span is held back until then, up to ``LONGEST_SPAN`` characters. A longer one, or one
that is not closed in its line, is shown with its markers as the model wrote it: no character is
ever lost. How the text is divided into pieces does not matter.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

LONGEST_SPAN = 120
"""Characters of the longest styled span: 4 seconds of waiting at 10 tokens/s."""

BOLD, ITALIC, STRUCK, CODE = "1", "3", "9", "36"
Fragment = tuple[str, str]
"""A text and its style: the parameters of the escape sequence that selects it."""

_SPECIAL = re.compile(r"[\\`*_~]")
_RUN = re.compile(r"(.)\1*", re.DOTALL)
_ESCAPABLE = frozenset("\\`*_~#")
_CLOSING = frozenset("!\"#$%&'()+,-./:;<=>?@[\\]^{|}，。！？；：、）」』】》”’…")
_STYLES = {
    ("*", 1): ITALIC, ("_", 1): ITALIC, ("*", 2): BOLD, ("_", 2): BOLD,
    ("*", 3): f"{BOLD};{ITALIC}", ("_", 3): f"{BOLD};{ITALIC}", ("~", 2): STRUCK,
}  # fmt: skip
_WAIT = -1
"""More text is needed to say where a span ends."""


class InlineStyler:
    """Filter that divides the text of one line into fragments; ``base`` is the style of all."""

    def __init__(self, base: str = "") -> None:
        self._base = base
        self._held = ""
        self._before = ""

    def push(self, text: str, *, final: bool = False) -> Iterator[Fragment]:
        """Add text, and yield the fragments that can be shown now; all of them if ``final``."""
        text = self._held + text
        self._held = ""
        position = 0
        while position < len(text):
            special = _SPECIAL.search(text, position)
            start = special.start() if special else len(text)
            if start > position:
                self._before = text[start - 1]
                yield text[position:start], self._base
            if special is None:
                return
            window = text[start : start + LONGEST_SPAN]
            span = _span(window, self._before, whole=final or len(window) == LONGEST_SPAN)
            if span is None:
                self._held = text[start:]
                return
            length, fragments = span
            for fragment, style in fragments:
                yield fragment, _joined(self._base, style)
            self._before = window[length - 1]
            position = start + length


def styled_fragments(text: str, base: str = "") -> list[Fragment]:
    """Divide a complete line into fragments."""
    return list(InlineStyler(base).push(text, final=True))


def _joined(outer: str, inner: str) -> str:
    return ";".join(part for part in (outer, inner) if part)


def _span(text: str, before: str, *, whole: bool) -> tuple[int, list[Fragment]] | None:
    """Read what begins at a special character.

    Args:
        whole: True if nothing that is important can follow the text.

    Returns:
        The length of what was read and its fragments, or None if more text is needed.
    """
    if text[0] == "\\":
        if len(text) == 1 and not whole:
            return None
        escaped = len(text) > 1 and text[1] in _ESCAPABLE
        return (2, [(text[1], "")]) if escaped else (1, [("\\", "")])
    run = len(_RUN.match(text).group())  # type: ignore[union-attr]
    if run == len(text) and not whole:
        return None
    literal = (run, [(text[:run], "")])
    if text[0] == "`":
        end = _code_end(text, run, whole=whole)
    elif (text[0], run) in _STYLES and _opens(text, run, before):
        end = _emphasis_end(text, run, whole=whole)
    else:
        return literal
    if end == _WAIT:
        return None
    if end == 0:
        return literal
    content = text[run : end - run]
    if text[0] == "`":
        return end, [(_code_content(content), CODE)]
    style = _STYLES[text[0], run]
    return end, [(part, _joined(style, own)) for part, own in styled_fragments(content)]


def _code_content(content: str) -> str:
    padded = content.startswith(" ") and content.endswith(" ") and content.strip()
    return content[1:-1] if padded else content


def _code_end(text: str, run: int, *, whole: bool) -> int:
    """Return the position after the closing marker; 0 if there is none."""
    position = run
    while (position := text.find("`", position)) >= 0:
        found = len(_RUN.match(text, position).group())  # type: ignore[union-attr]
        position += found
        if position == len(text) and not whole:
            return _WAIT
        if found == run:
            return position
    return 0 if whole else _WAIT


def _opens(text: str, run: int, before: str) -> bool:
    """True if a run of markers can begin a span: text follows directly."""
    after = text[run : run + 1]
    if not after or after.isspace():
        return False
    inside_word = before.isascii() and before.isalnum()
    if (run == 1 or text[0] == "_") and inside_word:
        return False  # 2*3, snake_case
    return not (after in _CLOSING and (before.isalnum() or before in _CLOSING) and before)


def _emphasis_end(text: str, run: int, *, whole: bool) -> int:
    """Return the position after the closing marker; 0 if there is none."""
    marker, position = text[0], run
    while position < len(text):
        character = text[position]
        if character == "\\":
            position += 2
            continue
        if character not in ("`", marker):
            position += 1
            continue
        found = len(_RUN.match(text, position).group())  # type: ignore[union-attr]
        end = position + found
        if end == len(text) and not whole:
            return _WAIT
        if character == "`":
            code = _code_end(text[position:], found, whole=whole)
            if code == _WAIT:
                return _WAIT
            position = position + code if code else end
            continue
        if _closes(text, position, found, run):
            return end
        position = end
    return 0 if whole else _WAIT


def _closes(text: str, position: int, found: int, run: int) -> bool:
    """True if a run of markers ends a span of ``run`` markers; its last ones do."""
    if text[position - 1].isspace() or found < run or (run == 1 and found == 2):
        return False
    after = text[position + found : position + found + 1]
    return not (text[0] == "_" and after.isascii() and after.isalnum())
