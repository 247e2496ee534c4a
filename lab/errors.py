"""The one error of the lab."""

from __future__ import annotations


class LabError(Exception):
    """What could not be done, in one sentence, and what to do about it."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
