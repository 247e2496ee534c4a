"""Control tokens that stand in a client's text, and are to stay text there.

A coding agent reads files that contain ``<|im_end|>``, and users write about ``<think>``. A chat
template writes such a text between the real control tokens, and a tokenizer cannot tell them apart.
So a separator is put within each marker of a client's text; the tokenizer encodes the parts on both
sides of a separator on their own, and drops it.
"""

from __future__ import annotations

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
        self._by_beginning: dict[str, list[str]] = {}
        for text in sorted({text for text in texts if len(text) > 1}):
            self._by_beginning.setdefault(text[:2], []).append(text)

    def separated(self, value: Any) -> Any:
        """Return a text, or all texts in lists and objects, with separators."""
        if isinstance(value, str):
            return self._separated_text(value)
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

    def _separated_text(self, text: str) -> str:
        # Plain searches: a regular expression of 270 markers takes minutes for a text of brackets.
        for beginning, markers in self._by_beginning.items():
            if beginning in text:
                for marker in markers:
                    if marker in text:
                        text = text.replace(marker, marker[0] + SEPARATOR + marker[1:])
        return text
