"""Widths of text on a terminal, in columns.

Terminals differ in how wide they draw sequences of emoji. A sequence is counted by its characters,
which is the widest form: a line that is counted too wide is broken early, one that is counted too
narrow would be broken by the terminal in the middle of a word.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

from rich.cells import get_character_cell_size

JOINER = "\u200d"
_EMOJI_FORM = "\ufe0f"
"""Variation selector that asks for the emoji of the character before it, which is wide."""
_SKIN_TONES = ("\U0001f3fb", "\U0001f3ff")


@lru_cache(4096)
def character_width(character: str) -> int:
    """Return the columns of one character: 0, 1 or 2."""
    if _SKIN_TONES[0] <= character <= _SKIN_TONES[1]:
        return 2  # modern terminals change the emoji before it instead
    return get_character_cell_size(character)


def text_width(text: str) -> int:
    """Return the columns of a text without control characters."""
    if text.isascii():
        return len(text)
    return sum(width for _, width in clusters(text))


def extends(character: str) -> bool:
    """True if a character changes the one before it, so that no line may break between them."""
    return character_width(character) == 0 or _SKIN_TONES[0] <= character <= _SKIN_TONES[1]


def clusters(text: str) -> Iterator[tuple[str, int]]:
    """Divide a text into characters with what belongs to them, each with its columns."""
    cluster, width = "", 0
    for character in text:
        if cluster and not (extends(character) or cluster.endswith(JOINER)):
            yield cluster, width
            cluster, width = "", 0
        cluster += character
        own = character_width(character)
        width += 1 if character == _EMOJI_FORM and width == 1 else own
    if cluster:
        yield cluster, width


def cut(text: str, columns: int) -> str:
    """Shorten a text of one line to at most ``columns``, with an ellipsis at its end."""
    if text_width(text) <= columns:
        return text
    kept, used = "", 0
    for cluster, width in clusters(text):
        if used + width > columns - 1:
            break
        kept, used = kept + cluster, used + width
    return kept.rstrip() + "…" if columns > 0 else ""
