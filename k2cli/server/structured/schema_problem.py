"""Problems of schemas, with the place of what is wrong."""

from __future__ import annotations

import json

_SHOWN_LETTERS = 80


class SchemaProblem(Exception):
    """A part of a schema that cannot be held.

    Attributes:
        pointer: the JSON pointer of the part.
        reason: what is wrong with it.
    """

    def __init__(self, pointer: str, reason: str) -> None:
        super().__init__(f"{pointer}: {reason}")
        self.pointer = pointer
        self.reason = reason


def shown(value: object) -> str:
    """Return a value as JSON text for a message, shortened."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _SHOWN_LETTERS else f"{text[:_SHOWN_LETTERS]}..."
