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

_OWN_TEXT = frozenset({"content", "reasoning_content"})
_Markers = dict[str, list[str]]


def _by_beginning(texts: Iterable[str]) -> _Markers:
    found: _Markers = {}
    for text in sorted({text for text in texts if len(text) > 1}):
        found.setdefault(text[:2], []).append(text)
    return found


class LiteralMarkers:
    """Separates the markers of a model in the texts of clients.

    Args:
        texts: the markers, of two letters or more.
        own: those of them that keep their meaning in an assistant's content.
    """

    def __init__(self, texts: Iterable[str] = (), own: Iterable[str] = ()) -> None:
        texts = set(texts)
        self._all = _by_beginning(texts)
        self._not_own = _by_beginning(texts - set(own))

    def separated(self, value: Any) -> Any:
        """Return a text, or all texts and names in lists and objects, with separators."""
        if isinstance(value, str):
            return _separated_text(value, self._all)
        if isinstance(value, list):
            return [self.separated(item) for item in value]
        if isinstance(value, dict):
            return {self.separated(name): self.separated(of) for name, of in value.items()}
        return value

    def separated_turn(self, turn: dict[str, Any]) -> dict[str, Any]:
        """Return a message with separators.

        An assistant's content is the model's text: it may have reasoning between tags, which
        some templates look for, and it may quote any marker that the model has read.
        """
        own = _OWN_TEXT if turn.get("role") == "assistant" else ()
        return {
            name: _separated_text(member, self._not_own)
            if name in own and isinstance(member, str)
            else self.separated(member)
            for name, member in turn.items()
        }


def _separated_text(text: str, by_beginning: _Markers) -> str:
    # Plain searches: a regular expression of 270 markers takes minutes for a text of brackets.
    for beginning, markers in by_beginning.items():
        if beginning in text:
            for marker in markers:
                if marker in text:
                    text = text.replace(marker, marker[0] + SEPARATOR + marker[1:])
    return text
