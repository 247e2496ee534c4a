"""Control tokens that stand in a client's text, and are to stay text there.

A coding agent reads files that contain ``<|im_end|>``, and users write about ``<think>``. A chat
template writes such a text between the real control tokens, and a tokenizer cannot tell them apart.
So a separator is put within each marker of a client's text; the tokenizer encodes the parts on both
sides of a separator on their own, and drops it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

SEPARATOR = "\ufdd0"
"""A noncharacter, which Unicode reserves for a program's own use."""

_OWN_TEXT = frozenset({"content", "reasoning_content", "role"})


class LiteralMarkers:
    """Separates the markers of a model in the texts of clients.

    Args:
        texts: the markers, of two letters or more.
    """

    def __init__(self, texts: Iterable[str] = ()) -> None:
        longest_first = sorted({text for text in texts if len(text) > 1}, key=len, reverse=True)
        # The letters up to the place of the separator, which may be shared by markers.
        self._pattern = (
            re.compile(
                "|".join(f"{re.escape(text[0])}(?={re.escape(text[1:])})" for text in longest_first)
            )
            if longest_first
            else None
        )

    def separated(self, value: Any) -> Any:
        """Return a text, or all texts in lists and objects, with separators."""
        if isinstance(value, str):
            return value if self._pattern is None else self._pattern.sub(_separate, value)
        if isinstance(value, list):
            return [self.separated(item) for item in value]
        if isinstance(value, dict):
            return {name: self.separated(member) for name, member in value.items()}
        return value

    def separated_turn(self, turn: dict[str, Any]) -> dict[str, Any]:
        """Return a message with separators.

        An assistant's content is the model's own text, in which some templates look for markers.
        """
        own = _OWN_TEXT if turn.get("role") == "assistant" else frozenset({"role"})
        return {
            name: member if name in own else self.separated(member) for name, member in turn.items()
        }


def _separate(found: re.Match[str]) -> str:
    return found[0] + SEPARATOR
